"""Stands in for parts of megatron.core.transformer.moe."""
