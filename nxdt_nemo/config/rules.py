"""check() and sanitise(): all rules of a configuration, as one Report.

Room config/ (leaf). Rules on one key are data (configs/rules/*.toml), those on several are functions (checks.py).
May import omegaconf, the standard library and nxdt_nemo's errors and _resources. Proof: tests/config/test_rules.py.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nxdt_nemo._resources import folder
from nxdt_nemo.config import checks, values
from nxdt_nemo.config.environment import settings
from nxdt_nemo.config.job import job_of
from nxdt_nemo.config.keys import unknown_keys
from nxdt_nemo.config.report import GONE, Change, Ignored, Report
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["ChangeRule", "IgnoreRule", "apply", "check", "rules", "sanitise"]


@dataclass(frozen=True)
class ChangeRule:
    """An entry of configs/rules/changes.toml: key becomes `to` if it is one of `when`, or true when `when` is empty."""

    key: str
    why: str
    to: Any = None
    when: tuple[Any, ...] = ()

    def changes(self, view: View) -> Iterator[Change]:
        """The change that this rule asks of a config, if any."""
        value = view.get(self.key)
        if (value in self.when if self.when else bool(value)) and value != self.to:
            yield Change(self.key, value, self.to, self.why)


@dataclass(frozen=True)
class IgnoreRule:
    """An entry of configs/rules/ignored.toml: key has no meaning here; its stock values are not worth a line."""

    key: str
    instead: str
    stock: tuple[Any, ...]

    def ignored(self, view: View) -> Iterator[Ignored]:
        """The line that this rule asks for, if any."""
        value = view.get(self.key)
        if value is not None and value not in self.stock:
            yield Ignored(self.key, value, self.instead)


@cache
def rules() -> tuple[tuple[ChangeRule, ...], tuple[IgnoreRule, ...]]:
    """The rules on one key, as they stand in configs/rules/."""
    where = folder("configs") / "rules"
    changes = tomllib.loads((where / "changes.toml").read_text(encoding="utf-8"))["change"]
    ignored = tomllib.loads((where / "ignored.toml").read_text(encoding="utf-8"))["ignored"]
    return (
        tuple(ChangeRule(**entry | {"when": tuple(entry.get("when", ()))}) for entry in changes),
        tuple(IgnoreRule(**entry | {"stock": tuple(entry["stock"])}) for entry in ignored),
    )


def check(
    cfg: DictConfig,
    *,
    world_size: int | None = None,
    training: bool | None = None,
    section: str = "",
    place: str = "",
    also: frozenset[str] = frozenset(),
    strict: bool | None = None,
    view: View | None = None,
) -> Report:
    """All that the rules find in a config, which stays as it is.

    world_size   ranks of the run; None if unknown: what depends on it is not judged
    training     whether the run trains; None leaves it to the config (it names an optimizer and no skip_train)
    section      path of cfg within the whole config: "model" when it is the model's own section
    place        the file that errors name
    also         names of keys that the user's own script reads
    strict       what NeMo would take without a word is an error too: unknown keys, contradictions that it settles by
                 itself, interpolations of nothing; None leaves it to neuron.strict_keys
    view         of cfg with the same section and place, where there is one already; it is used up

    trainer.accelerator=cpu gives an empty report: nothing of this backend applies then.
    Raises ConfigError only for a broken `neuron:` section.
    """
    view = view or View(cfg, section=section, place=place)
    view.world_size = world_size
    report = Report()
    if view.get("trainer.accelerator") == "cpu":
        return report
    view.training = checks.trains(view) if training is None else training
    if view.get("neuron") is not None:
        from nxdt_nemo.config.neuron import neuron_section

        report.neuron = neuron_section(cfg, place=place)
    if strict is None:
        strict = report.neuron is not None and report.neuron.strict_keys
    report.errors = [error for rule in values.ERRORS for error in rule(view)]
    report.errors += [e for rule in checks.ERRORS for e in rule(view) if e.reason.split("=")[0] not in view.forgotten]
    report.errors += _judge_environment(report, view)
    report.doubts = [doubt for rule in checks.DOUBTS for doubt in rule(view)]
    report.defaults = values.defaults(view)
    report.to_be_set = values.to_be_set(view)
    _judge_unknown(report, view, also, strict)
    report.warnings += _device_count(report, view)
    table, ignored = rules()
    report.changes = [change for rule in checks.CHANGES for change in rule(view)]
    report.changes += [change for entry in table for change in entry.changes(view)]
    report.ignored = [line for entry in ignored for line in entry.ignored(view)]
    report.warnings += [
        f"{change.key}={change.old}: this backend computes in {change.new} instead of fp16"
        for change in report.changes
        if change.key.endswith(".precision")
    ]
    return report


def sanitise(
    cfg: DictConfig,
    *,
    world_size: int | None = None,
    training: bool | None = None,
    section: str = "",
    place: str = "",
    also: frozenset[str] = frozenset(),
) -> Report:
    """check(), and its changes applied to cfg in place, struct mode or not; a config with errors stays as it is.

    After it NeMo's stock code runs on this backend, and a second call finds nothing to change.
    """
    report = check(cfg, world_size=world_size, training=training, section=section, place=place, also=also)
    if not report.errors:
        apply(cfg, report.changes, section=section)
    return report


def apply(cfg: DictConfig, changes: Iterable[Change], *, section: str = "") -> None:
    """Make the changes in a config, or in one section of it."""
    local = View(cfg, section=section).local
    with open_dict(cfg):
        for change in changes:
            above, _, name = local(change.key).rpartition(".")
            if change.new == GONE:
                (OmegaConf.select(cfg, above) if above else cfg).pop(name)
            else:
                OmegaConf.update(cfg, local(change.key), change.new, merge=False, force_add=True)


def _judge_environment(report: Report, view: View) -> Iterator[ConfigError]:
    """Keys of `neuron:` that contradict others, or have a value that their variable cannot take."""
    try:
        report.job = job = job_of(view, report.neuron)
        if report.neuron is not None:
            settings(job)
            there = dataclasses.replace(job, lane=job.lane_there)
            if report.neuron.runtime == there.lane:  # else the lane is the environment's to say
                there.check_lane()
            if report.neuron.lnc is not None:
                there.check_ranks()
    except ConfigError as error:
        yield error


def _judge_unknown(report: Report, view: View, also: frozenset[str], strict: bool) -> None:
    """Unknown keys and doubts: warnings, or errors when strict."""
    report.unknown = unknown_keys(view.plain, section=view.section, also=also)
    found = [ConfigError(str(key), place=view.place) for key in report.unknown] + report.doubts
    if strict:
        report.errors += found
    else:
        report.warnings += [str(doubt) for doubt in found]
    if report.foreign:
        said = f"is written for {report.foreign}; nxdt-nemo migrate makes NeMo's of it"
        report.warnings.insert(0, f"{view.place}: {said}" if view.place else f"this configuration {said}")


def _device_count(report: Report, view: View) -> Iterator[str]:
    """The devices that the instance named in `neuron:` has, against those asked for."""
    if any(error.reason.startswith("trainer.devices=") for error in report.errors):
        return
    counts = report.neuron.devices() if report.neuron is not None else ()
    devices = view.get("trainer.devices")
    asked = len(devices) if isinstance(devices, list) else view.number("trainer.devices")
    if counts and asked is not None and asked >= 0 and asked not in counts:
        has = " or ".join(str(count) for count in counts)
        instance = report.neuron.instance if report.neuron is not None else ""
        yield f"trainer.devices={asked}, but a {instance} has {has} devices"
