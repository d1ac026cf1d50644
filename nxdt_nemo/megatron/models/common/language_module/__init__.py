"""Stands in for parts of megatron.core.models.common.language_module."""
