"""Room megatron/: what stands in for megatron.core.datasets."""
