"""Stands in for nemo.collections.llm.modelopt.quantization."""
