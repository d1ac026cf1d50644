"""`nxdt-nemo validate`: a YAML file with its overrides composed and checked, as a run would, and nothing started.

Room config/ (leaf). Unlike a run it asks nothing of this machine: files and packages that are not here are warnings,
and `???` is for whoever starts the run. Imports hydra only where there is something to compose.
Proof: tests/config/test_validate.py, tools/fuzz.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nxdt_nemo._resources import folder
from nxdt_nemo.config import values
from nxdt_nemo.config.compose import Entry, compose_entry, settle, world_size
from nxdt_nemo.config.instances import Instance
from nxdt_nemo.config.job import Job, job_of
from nxdt_nemo.config.keys import unknown_keys
from nxdt_nemo.config.neuron import neuron_section
from nxdt_nemo.config.report import Report
from nxdt_nemo.config.rules import check
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError, HereError, UserError

__all__ = [
    "Verdict",
    "asked",
    "asked_on",
    "find",
    "has_defaults",
    "hydra_options",
    "read",
    "sections",
    "validate",
    "validate_config",
]

# Ends of the top-level keys of NeMo's scripts that restore a model, and so need no `model:`.
RESTORES = ("inference", "model_file", "model_path")


@dataclass
class Verdict:
    """What is to be said about a configuration.

    place      the file
    errors     what ends a run
    warnings   what a run would say, and what is not on this machine
    to_be_set  keys that whoever starts the run has to give
    report     all that the rules found
    ranks      of the run, None if the configuration does not say
    """

    place: str
    cfg: DictConfig
    report: Report
    ranks: int | None = None
    strict: bool = False
    errors: list[ConfigError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def to_be_set(self) -> list[str]:
        return self.report.to_be_set

    @property
    def good(self) -> bool:
        """True when nothing would end a run but what is still to be given."""
        return not self.errors

    def judge(self, doubts: Iterable[ConfigError]) -> None:
        """Doubts found elsewhere: errors when strict, as the rules' own."""
        for doubt in doubts:
            if self.strict:
                self.errors.append(doubt)
            else:
                self.warnings.append(str(doubt))

    def as_json(self) -> dict[str, Any]:
        """For other programs; lines as text."""
        return {
            "place": self.place,
            "good": self.good,
            "errors": [str(error) for error in self.errors],
            "warnings": self.warnings,
            "to_be_set": self.to_be_set,
            "unknown": [vars(key) for key in self.report.unknown],
            "changes": [vars(change) for change in self.report.changes],
            "ignored": [entry._asdict() for entry in self.report.ignored],
            "defaults": {default.key: default.value for default in self.report.defaults},
            "ranks": self.ranks,
        }


def validate(path: Path, overrides: Sequence[str] = (), *, strict: bool | None = None) -> Verdict:
    """A file with hydra's overrides. Raises ConfigError when it cannot be read or composed."""
    return validate_config(read(path, overrides), place=path.name, strict=strict)


def read(path: Path, overrides: Sequence[str] = (), *, groups: Path | None = None) -> DictConfig:
    """The composed configuration; a name of ours (`train`) stands for the file in configs/.

    groups  a further folder for what the file includes
    """
    path = find(path)
    text = _text(path)
    if not overrides and not has_defaults(text):
        return _plain(path)
    if path.suffix == ".yaml":
        return compose_entry(Entry(path.resolve().parent, path.name, tuple(overrides), groups))
    with TemporaryDirectory(prefix="nxdt_nemo-") as folder:  # hydra takes no other ending
        copy = Path(folder) / f"{path.stem}.yaml"
        copy.write_text(text, encoding="utf-8")
        return compose_entry(
            Entry(copy.parent, copy.name, tuple(overrides), groups or path.resolve().parent, file=path.name)
        )


def hydra_options(path: Path) -> list[str]:
    """The options that make a script read a file. Raises ConfigError for one that hydra does not take."""
    if path.suffix != ".yaml":
        raise ConfigError("hydra takes no ending but .yaml", place=path.name, fix="rename it")
    return [f"--config-path={path.parent}", f"--config-name={path.stem}"]


def asked(path: Path, overrides: Sequence[str] = (), *, on: Instance | None = None) -> tuple[Job, View]:
    """What the environment of a run has to be, and the configuration that says so.

    on  the instance type, in place of neuron.instance
    Raises ConfigError for a file of another product: its keys would count for nothing.
    """
    cfg = read(path, overrides)
    view = View(cfg, place=path.name)
    Report(unknown=unknown_keys(view.plain)).raise_foreign(path)
    return job_of(view, neuron_section(cfg, place=path.name), on=on), view


def asked_on(path: Path, overrides: Sequence[str], kind: Instance) -> Job:
    """What the environment of a run on an instance type has to be.

    Raises ConfigError as asked(), for a value of another kind than its key takes, and for a trainer that is no section.
    """
    job, view = asked(path, overrides, on=kind)
    for error in [*sections(view), *values.kinds(view)]:
        raise error
    return job


def find(path: Path) -> Path:
    """A file, or the one of ours that has this name (`train`). Raises UserError when there is neither."""
    if path.is_file():
        return path
    ours = folder("configs") / f"{path.stem}.yaml"
    if path.parent == Path() and ours.is_file():
        return ours
    if path.is_dir():
        raise UserError("is a folder", place=str(path), fix="name a YAML file in it")
    from difflib import get_close_matches

    beside = sorted(file.name for file in path.parent.glob("*.y*ml"))
    near = get_close_matches(path.name, beside, n=1)
    fix = f"beside it: {', '.join(beside[:5])}" if beside else "see nxdt-nemo configs list"
    raise UserError(
        "there is no such file", place=str(path), fix=f"did you mean {path.parent / near[0]}?" if near else fix
    )


def has_defaults(text: str) -> bool:
    """True if hydra has something to compose. Read as text: a YAML parser costs more, and would say the same."""
    return re.search(r"""^(["']?)defaults\1\s*:""", text, re.MULTILINE) is not None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError("is not text in UTF-8", place=path.name) from None


def _plain(path: Path) -> DictConfig:
    """A file that stands alone."""
    from yaml import YAMLError

    try:
        cfg = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as error:  # an interpolation without its end is omegaconf's
        raise ConfigError(f"not readable as YAML: {' '.join(str(error).split())}", place=path.name) from None
    if not isinstance(cfg, DictConfig):
        raise ConfigError("is a list, not a configuration", place=path.name, fix="begin with trainer: and model:")
    settle(cfg)
    return cfg


def validate_config(
    cfg: DictConfig,
    *,
    place: str = "",
    strict: bool | None = None,
    environ: Mapping[str, str] | None = None,
    more: Iterable[ConfigError] = (),
) -> Verdict:
    """A composed configuration. environ: a launcher's variables, none by default; more: errors found elsewhere."""
    view = View(cfg, place=place)
    ranks = world_size(cfg, environ or {}, view=view)
    try:
        report = check(cfg, world_size=ranks, place=place, strict=strict, view=view)
    except ConfigError as broken:  # a broken `neuron:`: the rest is checked without it
        report = check(_without_neuron(cfg), world_size=ranks, place=place, strict=strict)
        report.errors.insert(0, broken)
    if strict is None:
        strict = report.neuron is not None and report.neuron.strict_keys
    found = Verdict(place, cfg, report, ranks, strict)
    for error in [*report.errors, *more, *sections(view)]:
        if isinstance(error, HereError):
            found.warnings.append(f"on this machine: {error}")
        elif not _is_to_be_set(view, error):
            found.errors.append(error)
    found.warnings += report.warnings
    return found


def sections(view: View) -> Iterable[ConfigError]:
    """Without these nothing else can be judged."""
    restores = any(key.endswith(RESTORES) for key in view.plain)
    for name in ("trainer",) if restores else ("trainer", "model"):
        if name not in view.forgotten and not isinstance(view.raw(name), dict):
            yield view.error(f"{name} is not a section", f"write {name}: and its keys below it")


def _is_to_be_set(view: View, error: ConfigError) -> bool:
    """True for an error about a key that is `???`."""
    key, _, rest = error.reason.partition(" ")
    return rest.startswith("is not set") and view.raw(key) == "???"


def _without_neuron(cfg: DictConfig) -> DictConfig:
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    return OmegaConf.create({key: value for key, value in plain.items() if key != "neuron"})
