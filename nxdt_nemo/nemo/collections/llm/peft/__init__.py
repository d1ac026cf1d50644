"""Stands in for nemo.collections.llm.peft."""
