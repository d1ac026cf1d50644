"""A transformer_engine that has no FP8, for tests that import the real one and have no use for it.

Room testing/. What `import transformer_engine` yields in the modules that --nxdt-te names (upstream.py beside this
folder). Proof: tests/testing/test_lockstep.py.
"""
