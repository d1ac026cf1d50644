"""apex.transformer.pipeline_parallel.

Room apex/. The schedules are megatron-core's. Proof: tests/apex/test_transformer.py.
"""
