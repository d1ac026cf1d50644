"""`nxdt-nemo compile`: the graphs of a configuration, compiled before the job that needs them; and what a cache holds.

Room audit/. Stands in for NxD Training's COMPILE=1 around neuron_parallel_compile. Imports neither torch nor torch_xla.
Proof: tests/audit/test_compile.py, tests/cli/test_compile.py.

    short_run   the run that meets every graph once: no checkpoints, no loggers
    cache       what is in a compilation cache: graphs, sizes, failures, locks that nobody holds
"""
