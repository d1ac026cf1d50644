"""Rank pool, parity helper and tiny models for tests, ours and users'. May use every room; none uses it."""
