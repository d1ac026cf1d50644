"""Stands in for parts of megatron.core.tensor_parallel."""
