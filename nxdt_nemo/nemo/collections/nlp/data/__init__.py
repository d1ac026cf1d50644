"""Stands in for parts of nemo.collections.nlp.data."""
