"""Stands in for parts of nemo.core.config."""
