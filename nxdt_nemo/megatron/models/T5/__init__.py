"""What stands in for megatron.core.models.T5."""
