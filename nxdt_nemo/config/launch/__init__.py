"""Scripts and manifests that start a job on several nodes, with the environment that Neuron needs.

Room config/ (leaf). Stands in for train.sh, train_setup.sh, run.slurm and k8s/ of NxD Training and NNM. The ranks of a
node are torchrun's everywhere; every variable comes from configs/environment.toml, with its reason and source.
Nothing that is written here asks for root. Proof: tests/config/test_launch.py, tests/cli/test_doctor_target.py.

    plan           what a launch is: the configuration, the script, nodes, ranks, variables
    shell          bash: quoting, exports, the command of a node
    torchrun, slurm, eks, parallelcluster    files for one launcher
"""

from __future__ import annotations

import importlib

from nxdt_nemo.config.launch.plan import Launch, plan

__all__ = ["Launch", "files", "plan"]


def files(launch: Launch) -> dict[str, str]:
    """The files to write, by name; the first is what a user starts or applies."""
    module = importlib.import_module(f"{__name__}.{launch.launcher}")
    made: dict[str, str] = module.files(launch)
    return made
