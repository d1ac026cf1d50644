"""Leaf data/: samples of what was prepared elsewhere. Imports no other room."""
