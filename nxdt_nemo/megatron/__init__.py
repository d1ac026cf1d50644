"""Room megatron/: what stands in for megatron.core, in files of upstream's names. Uses runtime and apex below it."""
