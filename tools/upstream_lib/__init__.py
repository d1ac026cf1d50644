"""Parts of tools/test_upstream.py."""
