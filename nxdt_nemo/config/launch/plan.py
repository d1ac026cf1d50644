"""What a launch is, from a configuration and the options of `nxdt-nemo launch`.

Room config/ (leaf). May import the room's own modules. Proof: tests/config/test_launch.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from nxdt_nemo.config.environment import Setting, settings
from nxdt_nemo.config.instances import INSTANCES, Instance, instance
from nxdt_nemo.config.job import Job, Launcher
from nxdt_nemo.config.report import Report, or_list
from nxdt_nemo.config.rules import check
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import HereError

__all__ = ["PORT", "REHEARSAL", "Launch", "plan"]

PORT = 29500
"""Where torchrun's nodes meet. Below Linux's ephemeral ports (32768 and up), so that nobody takes it by chance."""

REHEARSAL = "cpu"
"""The target of a launch on hosts without Trainium."""


@dataclass(frozen=True)
class Launch:
    """A job and how it is started.

    command    the command line that wrote it, for the files' first lines
    name       of the job, letters, digits and -
    config     the YAML file, absolute
    overrides  hydra's, as the user gave them
    script     the user's training script as it is called on the nodes; None for this package's own
    nodes      how many there are
    ranks      on each of them
    job        what the variables depend on
    settings   the variables, in the table's order
    text       the composed configuration as YAML
    image      of the container (eks)
    claim      PersistentVolumeClaim that is mounted at /shared (eks)
    notes      what to know before it is started
    """

    command: str
    launcher: Launcher
    name: str
    config: Path
    overrides: tuple[str, ...]
    script: str | None
    nodes: int
    ranks: int
    job: Job
    settings: tuple[Setting, ...]
    text: str
    image: str = ""
    claim: str = ""
    notes: tuple[str, ...] = ()

    @property
    def instance(self) -> Instance | None:
        """The instance type of the nodes; None in a rehearsal."""
        return self.job.instance

    @property
    def sizes(self) -> tuple[str, ...]:
        """Overrides that say how many ranks torchrun starts."""
        return f"++trainer.num_nodes={self.nodes}", f"++trainer.devices={self.ranks}"

    @property
    def where(self) -> str:
        """`2 x trn2.48xlarge, 64 ranks each`."""
        return f"{self.nodes} x {self.instance.name if self.instance else 'host'}, {self.ranks} ranks each"


def plan(
    cfg: DictConfig,
    *,
    launcher: Launcher,
    config: Path,
    overrides: Sequence[str] = (),
    command: str = "",
    script: str | None = None,
    target: str | None = None,
    nodes: int | None = None,
    image: str = "",
    claim: str = "",
) -> Launch:
    """The launch of a composed configuration.

    target  an instance type or "cpu"; None takes neuron.instance, and "cpu" where neuron.runtime=cpu says so
    nodes   None takes trainer.num_nodes
    Raises ConfigError for an unknown target, for ranks that the instance cannot have, for nodes without a network,
    and for what the configuration's own check finds, except files that this host has not.
    """
    from omegaconf import OmegaConf

    view = View(cfg, place=config.name)
    report = check(cfg, place=config.name)
    report.raise_foreign(config)
    if report.job is None:
        raise view.error("trainer.accelerator=cpu runs without this backend", "use trainer.accelerator=neuron")
    kind = _target(view, report, target)
    if kind is None and launcher == "parallelcluster":
        raise view.error("a cluster of which instance?", f"use --target {or_list(INSTANCES)}")
    nodes = nodes if nodes is not None else view.size("trainer.num_nodes")
    job = dataclasses.replace(report.job, instance=kind, nodes=nodes, launcher=launcher)
    job = dataclasses.replace(job, lane=job.lane_there if kind is not None else _lane(report))
    job.check_lane()
    ranks = _ranks(view, job)
    job = dataclasses.replace(job, devices=ranks)
    job.check_ranks()
    job.check_nodes()
    notes = [*_checked(cfg, config.name, nodes * ranks), *_notes(view, job)]
    return Launch(
        command=command,
        launcher=launcher,
        name=_name(view, config),
        config=config.resolve(),
        overrides=tuple(overrides),
        script=script,
        nodes=nodes,
        ranks=ranks,
        job=job,
        settings=tuple(settings(job, "process", "launch", "nodes")),
        text=OmegaConf.to_yaml(cfg),
        image=image,
        claim=claim,
        notes=tuple(notes),
    )


def _target(view: View, report: Report, asked: str | None) -> Instance | None:
    """The instance type, None for a rehearsal."""
    runtime = report.neuron.runtime if report.neuron is not None else None
    if asked == REHEARSAL or (asked is None and runtime == "cpu"):
        return None
    if asked is not None:
        return instance(asked, place="--target")
    if report.job is None or report.job.instance is None:
        raise view.error("on which instance?", "use --target trn2.48xlarge, or neuron.instance; --target cpu rehearses")
    return report.job.instance


def _lane(report: Report) -> str:
    """The lane of a rehearsal's ranks."""
    asked = report.neuron.runtime if report.neuron is not None else None
    return asked if asked in ("xla", "neuron") else "cpu"


def _ranks(view: View, job: Job) -> int:
    """trainer.devices, else all logical cores of the instance."""
    devices = view.get("trainer.devices")
    asked = len(devices) if isinstance(devices, list) else view.number("trainer.devices")
    kind = job.instance
    if asked is None or asked < 1:
        if kind is None:
            raise view.error(f"trainer.devices={devices}: how many ranks a host?", "set a number")
        return kind.cores(job.cores_a_rank)
    return asked


def _checked(cfg: DictConfig, place: str, world: int) -> list[str]:
    """What the check finds with all ranks known: raises the first error; files are those of the nodes."""
    report = check(cfg, world_size=world, place=place)
    here = [error for error in report.errors if isinstance(error, HereError)]
    for error in report.errors:
        if error not in here:
            raise error
    return [*report.warnings, *(f"{error.reason} on this host; the nodes have to have it" for error in here)]


def _notes(view: View, job: Job) -> list[str]:
    """What goes wrong later, or for want of something that a launcher cannot know."""
    found = []
    if job.instance is not None and job.nodes > 1 and job.lane == "xla" and "compiler_cache_url" not in job.keys:
        found.append(
            "neuron.compiler_cache_url is not set: each node compiles for itself; name a shared folder or s3://"
        )
    if job.launcher in ("slurm", "parallelcluster", "eks"):
        if not view.get("exp_manager.resume_if_exists", False):
            found.append("exp_manager.resume_if_exists is not True: a job that is put back begins anew")
        if not view.get("exp_manager.explicit_log_dir") and not view.get("exp_manager.exp_dir"):
            found.append("exp_manager.exp_dir is not set: results go to the nodes' working folder")
    return found


def _name(view: View, config: Path) -> str:
    """cfg.name as a name that SLURM and Kubernetes take."""
    text = re.sub(r"[^a-z0-9]+", "-", str(view.get("name", config.stem)).lower()).strip("-")
    return text[:40].rstrip("-") or "job"
