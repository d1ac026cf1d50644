"""Stands in for parts of nemo.collections."""
