"""Stands in for parts of megatron.core.pipeline_parallel."""
