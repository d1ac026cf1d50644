"""Is this machine fit to train? Six stages, from the device to a run that is saved and resumed, in one report.

Room testing/. `nxdt-nemo doctor --on-device` starts it as a process of its own. Stages run in processes and share
ten minutes; all are known to run on the cpu and xla lanes of a laptop, and nobody has run them on Trainium.
Proof: tests/testing/test_selftest.py.

    stages     the stages, in order, and what each found
    pieces     what runs in a rank: device, dtypes, collectives
    training   NeMo runs of a tiny Llama: a step, the cpu lane's losses, a checkpoint and its resumption
    report     the Markdown to paste into a bug
"""

from nxdt_nemo.testing.selftest.stages import Outcome, run

__all__ = ["Outcome", "run"]
