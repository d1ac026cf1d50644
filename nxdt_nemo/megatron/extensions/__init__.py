"""What stands in for megatron.core.extensions."""
