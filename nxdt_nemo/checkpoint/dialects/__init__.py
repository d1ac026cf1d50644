"""How Megatron and its relatives name and fuse the logical tensors; one file each, for all families at once."""
