"""Stands in for parts of nemo.collections.nlp.modules.common.megatron.adapters."""
