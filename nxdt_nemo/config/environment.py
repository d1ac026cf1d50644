"""The environment that a run on Trainium needs, from one typed table: configs/environment.toml.

Room config/ (leaf). Stands in for process_config of NxD Training's training_orchestrator.py and for NNM's
train_setup.sh. Imports the standard library, packaging and nxdt_nemo's errors and _resources.
Proof: tests/config/test_environment.py.

`nxdt-nemo run` and a plain start set it before torch_xla is imported, launch scripts export it, `doctor --target`
prints it. A key of `neuron:` comes before what the user has exported, and that before the table.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, get_args

from nxdt_nemo._resources import folder
from nxdt_nemo.config.job import Job, Launcher
from nxdt_nemo.errors import ConfigError

__all__ = [
    "LNC",
    "Kind",
    "Refused",
    "Setting",
    "Variable",
    "Where",
    "apply",
    "joined",
    "refused",
    "settings",
    "variables",
]

Kind = Literal["switch", "count", "seconds", "megabytes", "lnc", "flags", "url", "address", "text"]
Where = Literal["process", "launch", "nodes", "compile"]
LNC = "NEURON_LOGICAL_NC_CONFIG"
_FLAGS, _LNC_OPTION = "NEURON_CC_FLAGS", "--logical-nc-config"
_MEANS: dict[Kind, tuple[str, str]] = {  # a value in full, and what to say of one that is not like that
    "switch": (r"[01]", "0 or 1"),
    "count": (r"\d+", "a number that is not negative"),
    "seconds": (r"\d+", "a number of seconds"),
    "megabytes": (r"[1-9]\d*", "a number of megabytes"),
    "lnc": (r"[12]", "1 or 2"),
    "flags": (r"\s*(-.*)?", "options that begin with -"),
    "url": (r"(s3://[^/\s]+(/\S*)?|(?!\w+://)\S+)", "a folder or an s3:// address"),
    "address": (r"\S+:\d+", "host:port"),
    "text": (r".*", "text"),
}


@dataclass(frozen=True)
class Variable:
    """A row of the table; what its fields mean is at the top of configs/environment.toml."""

    name: str
    type: Kind
    where: Where
    reason: str
    source: str
    value: str | None = None
    key: str = ""
    nxdt: str = ""
    precision: Mapping[str, str] = field(default_factory=dict)
    chip: Mapping[str, str] = field(default_factory=dict)
    instance: Mapping[str, str] = field(default_factory=dict)
    on: tuple[Launcher, ...] = get_args(Launcher)
    lanes: tuple[str, ...] = ("xla", "neuron")
    sdk: str = ""
    shell: bool = False

    @property
    def when(self) -> str:
        """`where`, and in brackets which SDKs and launchers only."""
        limits = [f"SDK {self.sdk}"] if self.sdk else []
        limits += [] if self.on == get_args(Launcher) else [" and ".join(self.on)]
        return f"{self.where} ({', '.join(limits)})" if limits else self.where

    def check(self, value: str, key: str = "", place: str = "") -> None:
        """Raises ConfigError for a value that is not of the variable's type, naming the key that gave it."""
        pattern, means = _MEANS[self.type]
        said = f"{key}: {self.name}={value}" if key else f"{self.name}={value}"
        if not self.shell and re.fullmatch(pattern, value) is None:
            raise ConfigError(f"{said} is not {means}", place=place)
        if self.type == "flags" and _words(value) is None:
            raise ConfigError(f"{said} has a quotation mark too many", place=place)


@dataclass(frozen=True)
class Refused:
    """A variable that makes a run wrong when it has this value, or another that torch-xla takes for true."""

    name: str
    when: str
    reason: str
    instead: str
    source: str

    def has(self, value: str) -> bool:
        """Whether this value of the variable is the wrong one."""
        return value.strip().lower() not in ("", "0", "false")

    def line(self, value: str) -> str:
        """What to say of it."""
        return f"{self.name}={value} {self.reason}; {self.instead}"


@dataclass(frozen=True)
class Setting:
    """A variable with the value that a run gets, before the user's own environment is looked at.

    by     who says so: a key such as neuron.exec_timeout, a precision mode, a chip, "the table"
    given  the part of `value` that a key of the configuration says; "" when it is all the table's
    """

    variable: Variable
    value: str
    by: str
    given: str = ""

    @property
    def name(self) -> str:
        """The variable's name."""
        return self.variable.name


@cache
def _table() -> tuple[tuple[Variable, ...], tuple[Refused, ...]]:
    read = tomllib.loads((folder("configs") / "environment.toml").read_text(encoding="utf-8"))
    rows = [entry | {"source": entry["source"].format(docs=read["docs"])} for entry in read["variable"]]
    lists = ("on", "lanes")
    found = [Variable(**row | {name: tuple(row[name]) for name in lists if name in row}) for row in rows]
    wrong = [Refused(**entry | {"source": entry["source"].format(docs=read["docs"])}) for entry in read["refused"]]
    return tuple(found), tuple(wrong)


def variables() -> tuple[Variable, ...]:
    """All rows, in the table's order."""
    return _table()[0]


def refused() -> tuple[Refused, ...]:
    """The variables that must not have a value."""
    return _table()[1]


def settings(job: Job, *where: Where) -> list[Setting]:
    """The variables that a job needs at these moments (default: in a process), in the table's order.

    After those of the table come the ones that neuron.environment names besides.
    Raises ConfigError for a value that is not of its variable's type, an LNC that the chip has not, or one of the
    compiler's that is not the runtime's.
    """
    found = list(_settings(job, where or ("process",)))
    extra = dict(job.keys.get("environment") or {})
    known = {variable.name: variable for variable in variables()}
    for name, given in extra.items():
        if re.fullmatch(r"[A-Za-z_]\w*", name) is None:
            raise job.error(f"neuron.environment: {name!r} is no name of a variable")
        variable = known.get(name, Variable(name, "text", "process", "the configuration says so", ""))
        value = str(int(given)) if isinstance(given, bool) else str(given)
        variable.check(value, "neuron.environment", job.place)
        for one in refused():
            if name == one.name and one.has(value):
                raise job.error(f"neuron.environment: {one.line(value)}")
        found = [one for one in found if one.name != name or variable.type == "flags"]
        found.append(Setting(variable, value, "neuron.environment", value))
    _check_lnc(found, job)
    return found


def _check_lnc(found: list[Setting], job: Job) -> None:
    """Raises ConfigError when the compiler is given another LNC than the runtime has."""
    environ: dict[str, str] = {}
    apply(found, environ)
    default = None if job.instance is None else str(job.instance.default_lnc)
    if two := _two_lncs(environ, default):
        raise job.error(two, "set neuron.lnc, and neither of them by hand")


def _two_lncs(environ: Mapping[str, str], default: str | None = None) -> str:
    """What says one LNC to the compiler and what says another to the runtime; "" when they agree.

    default   the chip's, for a runtime that is told none
    """
    compiler = _lnc_of(environ.get(_FLAGS, ""))
    runtime = environ.get(LNC) or default
    if compiler is None or runtime in (None, compiler):
        return ""
    has = f"{LNC}={runtime}" if environ.get(LNC) else f"the chip has LNC {runtime}"
    return f"{_FLAGS} has {_LNC_OPTION} {compiler}, and {has}: compiler and runtime need the same"


def _lnc_of(line: str) -> str | None:
    """The LNC in a line of the compiler's options, the last that is named; None without one."""
    found = None
    for option in _options(line):
        if _name(option) == _LNC_OPTION:
            found = option[0].partition("=")[2] or "".join(option[1:2])
    return found


def _settings(job: Job, where: tuple[Where, ...]) -> Iterator[Setting]:
    for variable in variables():
        if variable.where not in where or job.lane not in variable.lanes or not _reads(variable.sdk, job.neuron_sdk):
            continue
        if variable.where == "nodes" and job.nodes == 1:
            continue
        if job.launcher is not None and job.launcher not in variable.on:
            continue
        setting = _setting(variable, job)
        if setting is not None:
            yield setting


def _setting(variable: Variable, job: Job) -> Setting | None:
    """The value for this job, None when nothing gives one."""
    said = {by: value.format(lnc=job.cores_a_rank) for by, value in _table_says(variable, job) if value is not None}
    given = _given(variable, job)
    key = f"neuron.{variable.key}"
    if variable.type == "flags":
        value = joined(given or "", *said.values())
        return Setting(variable, value, ", ".join([*said, *([key] if given else [])]), given or "") if value else None
    if given is not None:
        return Setting(variable, given, key, given)
    if not said:
        return None
    by, value = list(said.items())[-1]
    variable.check(value)
    return Setting(variable, value, by)


def _table_says(variable: Variable, job: Job) -> Iterator[tuple[str, str | None]]:
    """Who in the table has a value, the most particular last."""
    yield "the table", variable.value
    mode = job.precision or "unknown"
    yield f"precision {mode}", variable.precision.get(mode)
    if job.instance is not None:
        yield job.instance.chip.name, variable.chip.get(job.instance.chip.name)
        yield job.instance.name, variable.instance.get(job.instance.name)


def _given(variable: Variable, job: Job) -> str | None:
    """What the variable's key in `neuron:` says, as text."""
    value = job.keys.get(variable.key) if variable.key else None
    if value is None:
        return None
    text = str(int(value)) if isinstance(value, bool) else str(value)
    variable.check(text, f"neuron.{variable.key}", job.place)
    return text


def _reads(specifier: str, sdk: str) -> bool:
    if not specifier:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(sdk)


def joined(first: str, *others: str) -> str:
    """Options of a command in one line: `first` as it is, then of the others each that is not named before it.

    `--a=b` and `--a b` are the same option, and so are --lnc, -lnc and --logical-nc-config, -O1 and --optlevel 2.
    """
    line = first.strip()
    for part in others:
        named = {_name(option) for option in _options(line)}
        line = " ".join([line, *(shlex.join(one) for one in _options(part) if _name(one) not in named)]).strip()
    return line


def _options(line: str) -> list[list[str]]:
    """The words of a line, each option with the words that belong to it."""
    found: list[list[str]] = []
    for word in _words(line) or line.split():
        if word.startswith("-") or not found:
            found.append([word])
        else:
            found[-1].append(word)
    return found


def _words(line: str) -> list[str] | None:
    """As a shell reads them; None where a quotation is not closed."""
    try:
        return shlex.split(line)
    except ValueError:
        return None


_SAME = {"-lnc": _LNC_OPTION, "--lnc": _LNC_OPTION, "-O": "--optlevel"}


def _name(option: list[str]) -> str:
    """What an option is called, without its value."""
    name = option[0].partition("=")[0]
    name = re.sub(r"^-O\d$", "-O", name)
    return _SAME.get(name, name)


def apply(found: Sequence[Setting], environ: MutableMapping[str, str]) -> list[str]:
    """Put settings into an environment; a second time changes nothing.

    An LNC that the user has exported is the compiler's too, where no key says another.
    Returns lines to tell: where a key and the user's own variable differ, and variables that make a run wrong.
    """
    told, exported = [], _exported_lnc(found, environ)
    for setting in found:
        name, before = setting.name, environ.get(setting.name, "")
        if setting.variable.type == "flags":
            environ[name] = joined(_with(before, setting.given), exported, setting.value)
        elif not before or setting.given:
            if before and before != setting.value:
                told.append(f"{name}={before} is set, and {setting.by} says {setting.value}: that is taken")
            environ[name] = setting.value
    told += [one.line(environ[one.name]) for one in refused() if one.has(environ.get(one.name, ""))]
    if two := _two_lncs(environ):
        told.append(f"{two}; set neuron.lnc, and neither of them by hand")
    return told


def _exported_lnc(found: Iterable[Setting], environ: Mapping[str, str]) -> str:
    """The compiler's option for the LNC that the user has exported and no key replaces; "" without one."""
    tables = any(setting.name == LNC and not setting.given for setting in found)
    return f"{_LNC_OPTION} {environ[LNC]}" if tables and environ.get(LNC) else ""


def _with(line: str, flags: str) -> str:
    """`line` with flags at its end, where the compiler heeds them; not again those that count there already."""
    counts = {_name(option): option for option in _options(line)}
    added = [shlex.join(one) for one in _options(flags) if counts.get(_name(one)) != one]
    return " ".join([line.strip(), *added]).strip()
