"""Stands in for parts of nemo.collections.nlp.models.language_modeling."""
