"""Helpers of tools/fuzz.py."""
