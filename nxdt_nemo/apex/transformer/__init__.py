"""apex.transformer: what megatron-core grew out of.

Room apex/. Proof: tests/apex/test_transformer.py.
"""
