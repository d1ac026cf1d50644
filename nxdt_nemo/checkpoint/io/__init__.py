"""Bytes: mapped files, safetensors, torch zips, and pickles that are read without running anything."""
