"""Stands in for parts of nemo.utils."""
