"""The arithmetic behind amp_C, the fused optimizers and the softmax extensions.

Room apex/. Tensors in, tensors out: no `.item()`, no boolean indexing, no branch on a value, so that one traced
graph serves every step and every rank. Proof: tests/apex/test_traceable.py.
"""
