"""Stands in for parts of nemo.core.optim."""
