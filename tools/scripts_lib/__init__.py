"""Pieces of tools/scripts.py: what scripts read (inputs.py), which there are (rows.py), what came out (shown.py)."""
