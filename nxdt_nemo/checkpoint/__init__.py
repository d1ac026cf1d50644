"""Leaf checkpoint/: formats and manifests of named tensors. Imports neither NeMo nor Megatron nor torch_xla."""
