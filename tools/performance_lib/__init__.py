"""The part of tools/performance.py that runs in a process of its own."""
