"""Leaf data/: packing and preparing samples. Imports no other room."""
