"""Helpers of tools/configs.py."""
