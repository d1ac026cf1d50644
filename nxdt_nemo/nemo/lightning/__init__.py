"""Stands in for nemo.lightning."""
