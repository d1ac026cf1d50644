"""Stands in for parts of megatron.core.fusions."""
