"""apex.transformer.pipeline_parallel.schedules.

Room apex/. Proof: tests/apex/test_transformer.py.
"""
