"""Stands in for parts of megatron.core.dist_checkpointing."""
