"""The run that meets every graph of a configuration once, and what it said of them.

Room audit/. Proof: tests/cli/test_compile.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from nxdt_nemo.config.compose import ranks_of_a_node
from nxdt_nemo.config.report import shown
from nxdt_nemo.config.validate import hydra_options
from nxdt_nemo.config.view import View

__all__ = ["STEPS", "Counts", "command", "overrides", "ranks", "read_counts"]

STEPS = 9
"""Of the run. Where exp_manager logs norms, it computes them in logged steps only, so that there are graphs with and
without them: of the first step, of the second, of those after a validation, and of all others."""

LOGGERS = ("tensorboard", "wandb", "mlflow", "dllogger", "clearml", "neptune")


@dataclass(frozen=True)
class Counts:
    """Of all ranks: graphs that were asked for, and those of them that the cache did not have."""

    graphs: int = 0
    missed: int = 0
    unreadable: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Counts)))


def ranks(view: View) -> int:
    """The ranks of a job, all of one node: a graph names the ranks of the whole world in its collectives, so that what
    another world extracts is another job's, and the compiler's cache finds none of it.

    Raises ConfigError for a job of several nodes, and for one that does not say how many ranks it has. NxD Training's
    and NNM's scripts extract on every node.
    """
    nodes = view.size("trainer.num_nodes")
    if nodes > 1:
        reason = f"trainer.num_nodes={nodes}: one node's graphs are not those of {nodes}, whose ranks they name"
        raise view.error(reason, "start a short run on every node (docs/trainium.md), or set trainer.num_nodes=1")
    found = ranks_of_a_node(view)
    if found is None:
        asked = shown(view.raw("trainer.devices"))
        raise view.error(f"trainer.devices={asked} is no number of ranks to compile for", "set trainer.devices")
    return found


def overrides(view: View, folder: Path, cache: str = "") -> list[str]:
    """hydra's, after the user's own: few steps with a validation, nothing written but into `folder`.

    cache  of Neuron's, where graphs go instead of where the configuration says
    A run hands the keys of `neuron:` on to its environment: those that differ there are replaced, the others left out.
    """
    replaced = {"runtime": "xla", "compiler_cache_url": cache}
    asked = "trainer.limit_val_batches"
    batches = min(2, view.number(asked, 2) or 0) if view.get(asked, 1.0) else 0
    logs = min(int(view.number("trainer.log_every_n_steps") or 3), 3)
    interval = 4 if logs == 3 else 3  # the steps after the two validations are one that is logged and one that is not
    return [
        f"++trainer.max_steps={STEPS}",
        f"++trainer.val_check_interval={interval}",
        f"++trainer.limit_val_batches={batches}",
        f"++trainer.log_every_n_steps={logs}",
        *(f"++exp_manager.create_{name}_logger=false" for name in LOGGERS),
        "++exp_manager.create_checkpoint_callback=false",
        "++exp_manager.resume_if_exists=false",
        f"++exp_manager.explicit_log_dir={folder}",
        *(f"++neuron.{key}={value}" for key, value in replaced.items() if value and view.get(f"neuron.{key}")),
    ]


def command(script: str | None, config: Path, words: Sequence[str], ranks: int) -> list[str]:
    """The command line: neuron_parallel_compile around it where Neuron's compiler is installed, torchrun for ranks."""
    wrapper = [found] if (found := shutil.which("neuron_parallel_compile")) else []
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    if script is None:
        program = ["-m", "nxdt_nemo", "run", "--config", str(config)]
    else:
        program = ["-m", "nxdt_nemo", "run", script, *hydra_options(config)]
    return [*wrapper, sys.executable, *torchrun, *program, *words]


def read_counts(folder: Path) -> Counts:
    """What the ranks wrote there when they ended."""
    total = Counts()
    for file in folder.glob("rank-*.json"):
        total += Counts(**json.loads(file.read_text()))
    return total
