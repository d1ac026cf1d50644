"""apex.contrib.optimizers.

Room apex/. Proof: tests/apex/test_absent.py.
"""
