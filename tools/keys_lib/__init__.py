"""Helpers of tools/keys.py."""
