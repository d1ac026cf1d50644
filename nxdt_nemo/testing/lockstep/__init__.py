"""pytest on several gloo ranks at once: each rank runs the same tests, in lock step.

    python -m nxdt_nemo.testing.lockstep --ranks 8 [--record FILE] [--logs FOLDER] -- PYTEST_ARGS

Room testing/. What `torchrun -m pytest` does, for suites where a test may fail on one rank while the others wait for
it: no rank goes on to the next test before all have ended this one; after a failure, a crash or a hang the ranks are
taken down and new ones take up at the next test. Each file starts on new ranks too. Starting is cheap: a rank has
imported and collected everything before, and is forked from there.

    __main__       the command: imports Megatron once, forks the ranks, and coordinates them
    coordinator    who runs what, how long, and what came of it
    worker         the pytest plugin of a rank
    record         what came of each test, for good
    groups         process groups that end a wait, and do not pile up

Proof: tests/testing/test_lockstep.py.
"""
