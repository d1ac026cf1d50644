"""Parts of tools/bench/startup.py."""
