"""migrate(): a configuration of any dialect as one of NeMo 2.4 that this backend runs, and a report of every key.

Room config/ (leaf). The table (rules.py) decides key by key, derive.py what needs more than one; what is written is the
text that was read, moved and renamed in place (tree.py). Running it on its own result changes nothing.
May import yaml, omegaconf and the leaf's other modules. Proof: tests/config/migrate/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nxdt_nemo.config.instances import INSTANCES
from nxdt_nemo.config.keys import load
from nxdt_nemo.config.migrate.report import Action, Entry, Level, MigrationReport
from nxdt_nemo.config.migrate.rules import DIALECTS, Rule, rule_for, table
from nxdt_nemo.config.migrate.tree import Document, Node
from nxdt_nemo.config.report import or_list
from nxdt_nemo.config.rules import rules as backend_rules
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import UserError

__all__ = ["TARGETS", "Migration", "Options", "Override", "Result", "dialect_of", "migrate", "parse_overrides"]

TARGETS = ("trn1.32xlarge", "trn2.48xlarge", "cpu")
# Sections that one dialect alone has; a key of the second list alone makes no dialect.
NXDT = ("distributed_strategy", "model_source", "model_alignment_strategy", "precision.type")
NNM = (
    *("model.wrap_with_zero", "model.zero_use_master_weight", "model.zero_use_fp32_grad_accum", "model.has_bias"),
    *("model.num_kv_heads", "model.sliding_window_size", "model.log_parameter_norm", "model.log_gradient_norm"),
    *("model.flexible_pipeline_parallel_stages", "model.disable_layer_norm_checkpointing", "model.save_logits"),
    *("model.convert_to_hf", "model.save_xser", "model.load_xser", "model.data.fine_tuning", "async_checkpointing"),
    *("enable_checkpoint_removal_protection", "enable_recovery_time_instrumentation", "model.data.fim_rate"),
)
# A file of these sections is a whole configuration, any other one a part that hydra includes somewhere.
WHOLE = ("trainer", "exp_manager", "model", "inference", "neuron", *NXDT)
INTERPOLATION = re.compile(r"\$\{([^${}:]+)\}")


@dataclass(frozen=True)
class Override:
    """A value from the command line. data: as Python reads it; text: as hydra does."""

    key: str
    data: Any
    text: str


@dataclass(frozen=True)
class Options:
    """What a migration is asked for.

    dialect       a key of DIALECTS, or auto
    target        a key of TARGETS, or "" to leave the devices as they are
    nodes         trainer.num_nodes, None to leave it
    training_precision   NNM's shell variable of that name, "" if nobody said it
    model_config  a Hugging Face config.json to read in place of the one that the file names
    overrides     in the file's own keys or NeMo's, put in before anything else
    findings      whether the checks of a run have a look at the result
    partial       the keys are some of a configuration's: nothing is added for those that are absent
    """

    dialect: str = "auto"
    target: str = ""
    nodes: int | None = None
    training_precision: str = ""
    model_config: Path | None = None
    overrides: tuple[Override, ...] = ()
    findings: bool = True
    partial: bool = False


@dataclass(frozen=True)
class Result:
    """text: the file to write; report: what happened to each key; rest: the overrides that the file has no key for."""

    text: str
    report: MigrationReport
    rest: tuple[Override, ...] = ()


def migrate(text: str, options: Options = Options(), *, place: str = "") -> Result:
    """A configuration as NeMo 2.4 YAML.

    place   the file that errors and the report name

    Raises ConfigError for text that is no configuration, and UserError for an option that is not known.
    """
    if options.target and options.target not in TARGETS:
        raise UserError("is no target", place=f"--target {options.target}", fix=f"use {or_list(TARGETS)}")
    document = Document(text, place)
    dialect = dialect_of(document) if options.dialect == "auto" else options.dialect
    if dialect not in DIALECTS:
        raise UserError("is no dialect", place=f"--from {options.dialect}", fix=f"use auto, {or_list(DIALECTS)}")
    rest = _override(document, options.overrides, dialect)
    work = Migration(document, dialect, options)
    work.run()
    return Result(document.render(), work.report, rest)


def dialect_of(document: Document) -> str:
    """nxdt or nnm if the file has keys that only they have, or the accelerator that only NNM names; else nemo."""
    if any(document.find(key) is not None for key in NXDT):
        return "nxdt"
    if any(document.find(key) is not None for key in NNM) or document.get("trainer.accelerator") == "tpu":
        return "nnm"
    return "nemo"


def parse_overrides(words: Sequence[str]) -> tuple[Override, ...]:
    """hydra's `key=value` arguments, with or without its `+` and `++`; of a mapping each value, since hydra merges it.

    Raises UserError for a word that is none, and for a sweep.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found: list[Override] = []
    parser = OverridesParser.create()
    for word in words:
        if "=" not in word:
            raise UserError("is no override", place=word, fix="write key=value")
        try:
            one = parser.parse_override(word)
        except HydraException:
            fix = "close brackets and quotes; a value with = or quotes in it is quoted"
            raise UserError("cannot be read as an override", place=word, fix=fix) from None
        if one.is_sweep_override():
            raise UserError("is a sweep, and this is one run", place=word, fix="write a list in brackets")
        found += _leaves(one.get_key_element().lstrip("+"), one.value(), one.get_value_string(), one._value)
    return tuple(found)


def _leaves(key: str, data: Any, text: str, parsed: Any) -> Iterator[Override]:
    """One override, or one for each value of a mapping. parsed: data with hydra's marks of quotes."""
    from hydra.core.override_parser.types import Override as Hydras

    if not isinstance(data, dict) or not data:
        yield Override(key, data, text)
        return
    for (name, value), inner in zip(data.items(), parsed.values(), strict=True):
        yield from _leaves(f"{key}.{name}", value, Hydras._get_value_element_as_str(inner), inner)


def _override(document: Document, overrides: Sequence[Override], dialect: str) -> tuple[Override, ...]:
    """Put in what the file, or its dialect, has a key for, under NeMo's name too; returns the others, NeMo's own."""
    rest = []
    theirs = {_target(node.path, dialect): node.path for node in document.nodes() if not node.is_section}
    for one in overrides:
        rule = rule_for(one.key, None, dialect, knows=False)
        own = rule is not None and (rule.file.startswith(("10", "20")) or rule.action != "keep")
        there = document.find(one.key)
        if there is not None and there.is_section and one.data == {}:  # merged, it changes nothing
            continue
        if there is None and one.key in theirs:
            document.set(theirs[one.key], one.data)
        elif there is None and not own:
            rest.append(one)
        else:
            node = document.set(one.key, one.data)
            node.origin = node.origin or one.key
    return tuple(rest)


def _target(path: str, dialect: str) -> str:
    """Where the table alone would put a key."""
    rule = rule_for(path, None, dialect, knows=False)
    return rule.target(path) if rule is not None else path


class Migration:
    """One file on its way: the document, what it said before, and the report.

    document   changed in place
    before     plain values of the file as it was read, interpolations resolved where they can be
    prefix     "model." for a part that hydra includes as a model, else ""
    """

    def __init__(self, document: Document, dialect: str, options: Options) -> None:
        self.document, self.dialect, self.options = document, dialect, options
        self.before = View(_config(document), place=document.place)
        self.report = MigrationReport(document.place, dialect, options.target)
        self.whole = options.partial or any(document.find(key) is not None for key in WHOLE)
        self.prefix = ""
        self.included = _included(document)
        self.written = {node.path: node.data for node in document.nodes()}
        self.moved: dict[str, str] = {}
        self.asked: dict[str, list[Rule]] = {}
        self._order: dict[str, int] = {}
        self._knows = load().knows

    def run(self) -> None:
        """All stages, in order."""
        from nxdt_nemo.config.migrate.derive import DERIVED

        if not self.whole:
            self._as_part()
        nodes = list(self.document.nodes())
        self._order = {node.path: at for at, node in enumerate(nodes)}
        self._sections()
        for node in nodes:
            if not node.is_section:
                self._key(node)
        for name, function in DERIVED.items():
            if self.whole and (name in self.asked or not self.options.partial):
                function(self)
        if self.whole and not self.options.partial:
            self._defaults()
            self._target()
        self.document.prune()
        self._interpolations()
        if self.whole and self.options.findings and not self.options.partial:
            self._findings()
        self.report.entries.sort(key=lambda entry: self._order.get(entry.key, len(self._order)))

    # For derive.py

    def node(self, key: str) -> Node | None:
        """The node that the file had at a path, wherever it is by now."""
        return next((node for node in self.document.nodes() if node.origin == key), None)

    def has(self, path: str) -> bool:
        """True if the file that was read has the key."""
        return self.before.has(path)

    def was(self, path: str, default: Any = None) -> Any:
        """The value that the file had, default if the key is absent, null or `???`."""
        return self.before.get(path, default)

    def absent(self, path: str) -> bool:
        """True if the migrated file has no such key, and no included file may bring it."""
        return self.document.find(path) is None and not any(path.startswith(f"{one}.") for one in self.included)

    def now(self, path: str, default: Any = None) -> Any:
        """The value that the key has by now, as written."""
        return self.document.get(path, default)

    def note(
        self, action: Action, key: str, to: str = "", *, new: Any = None, why: str = "", level: Level = ""
    ) -> None:
        """Report on a key; its old value is that of the file."""
        old = self.written.get(key) if key else None
        self.report.entries.append(Entry(key, action, to, old, new, why, level))

    def put(self, path: str, value: Any, why: str, *, key: str = "", level: Level = "") -> None:
        """Give a key of NeMo's a value that was worked out, and report it: of `key` if it stands for that, or added."""
        node = self.document.find(path)
        if node is None and not key:
            self.document.set(path, value)
            self.note("derived", "", path, new=value, why=why, level=level)
            return
        source = key or (node.origin if node is not None else "") or path
        old = self.node(key) if key and key != path else None
        if old is not None and node is None:
            self.document.move(old, path)
            self.moved[key] = path
        elif old is not None:
            self.document.remove(old)
        changed = self.document.find(path)
        if changed is None or changed.data != value or changed.is_section:
            self.document.set(path, value)
        self.forget(source)
        action: Action = "kept" if source == path and self.before.raw(source) == value else "mapped"
        self.note(action if self.before.has(source) else "derived", source, path, new=value, why=why, level=level)

    def drop(self, key: str, why: str, level: Level = "") -> None:
        """Take a key out, if it is there; a value that somebody refers to is put in the reference's place."""
        node = self.node(key)
        if node is None:
            return
        self.document.remove(node)
        self.forget(key)
        self.note("dropped", key, why=why, level=level)

    def keep(self, key: str, why: str = "", level: Level = "") -> None:
        """Leave a key as it is, if it is there."""
        node = self.node(key)
        if node is not None:
            self.forget(key)
            self.note("kept", key, node.path, new=node.data, why=why, level=level)

    def ask(self, path: str, question: str) -> None:
        """Leave a value to a person: `???`, which hydra refuses to run with."""
        if self.absent(path) or self.now(path) is None:
            self.document.set(path, "???", "???")
            self.forget(path)
            self.note("derived", "", path, new="???", why=question, level="question")

    def forget(self, key: str) -> None:
        """One entry a key: a later one takes the place of an earlier."""
        self.report.entries = [entry for entry in self.report.entries if entry.key != key or not key]

    # The stages

    def _as_part(self) -> None:
        """A part that hydra includes: read as a model's if most of its keys are."""
        paths = [node.path for node in self.document.nodes() if not node.is_section]
        theirs = [path for path in paths if self._knows(f"model.{path}")]
        self.prefix = "model." if 2 * len(theirs) > len(paths) else "?"

    def _sections(self) -> None:
        """Whole sections go to their new places first, with their comments."""
        if self.dialect != "nxdt":
            return
        data = self.document.find("data")
        if data is not None and data.is_section and self.document.find("model.data") is None:
            self.document.section("model")
            tokenizer = self.document.find("data.tokenizer")
            if tokenizer is not None and self.document.find("model.tokenizer") is None:
                self.document.move(tokenizer, "model.tokenizer")
            self.document.move(data, "model.data")

    def _key(self, node: Node) -> None:
        """What the table says about one key."""
        origin = node.origin or node.path
        known = self.prefix + origin
        if self.prefix == "?" or (self.prefix and not self._knows(known)):
            self.note(
                "kept", origin, origin, new=node.data, why="a part that hydra includes; the file that does says where"
            )
            return
        rule = rule_for(known, self.before.raw(origin), self.dialect, self._knows(known))
        if rule is None:
            self._unknown(node, known)
        elif rule.action == "derive":
            self.asked.setdefault(rule.by, []).append(rule)
            why = self._by_backend(origin, node.data) if self._knows(known) else rule.why
            self.note("kept", origin, node.path, new=node.data, why=why)
        elif rule.action == "drop":
            self.document.remove(node)
            self.note("dropped", origin, why=rule.why)
        elif rule.action in ("warn", "error"):
            level: Level = "warning" if rule.action == "warn" else "error"
            self.note("kept", origin, node.path, new=node.data, why=rule.why, level=level)
        else:
            self._placed(node, origin, rule)

    def _placed(self, node: Node, origin: str, rule: Rule) -> None:
        """keep, map, move and rename."""
        target, value = rule.target(origin), rule.mapped(node.data)
        if rule.action in ("move", "rename") and target != node.path:
            if self.document.find(target) is not None:
                self.document.remove(node)
                self.note("dropped", origin, why=f"the file says {target} too, which stays", level="warning")
                return
            self.document.move(node, target)
        if target != origin and rule.action in ("move", "rename"):
            self.moved[origin] = target
        action: Action = "kept"
        if value != node.data:
            node.set(value)
            action = "mapped"
        elif node.path != origin:
            action = "renamed" if rule.action == "rename" else "moved"
        level: Level = ""
        if action != "kept" and not self._knows(self.prefix + node.path):
            action, level = "unknown", "warning"
        why = rule.why if action != "kept" or not rule.known else self._by_backend(origin, node.data)
        if action == "kept" and rule.action == "map":
            why = self._by_backend(origin, node.data)
        if level:
            why = f"{load().nearest(node.path)}"
        self.note(action, origin, node.path, new=node.data, why=why, level=level)

    def _by_backend(self, path: str, value: Any) -> str:
        """What the backend does with a kept key at start-up, if it does not mean what it says."""
        for change in backend_rules()[0]:
            if change.key == path and (value in change.when if change.when else bool(value)):
                return f"becomes {change.to} at start-up: {change.why}"
        return "NeMo 2.4 reads it"

    def _unknown(self, node: Node, known: str) -> None:
        text = str(load().nearest(known)).removeprefix(f"unknown key {known}; ")
        self.note("unknown", node.origin or node.path, node.path, new=node.data, why=text, level="warning")

    def _defaults(self) -> None:
        for rule in table():
            if rule.action != "default" or self.dialect not in rule.dialect:
                continue
            for path in rule.key:
                section = path.rpartition(".")[0]
                if self.absent(path) and self.document.find(section) is not None:
                    self.document.set(path, rule.value)
                    self.note("derived", "", path, new=rule.value, why=rule.why)

    def _target(self) -> None:
        """The instance and the number of nodes that were asked for."""
        target = self.options.target
        if target == "cpu":
            self.put("neuron.runtime", "cpu", "--target cpu: a rehearsal on the cpu lane")
        elif target:
            self.put("neuron.instance", target, f"--target {target}")
            ranks = INSTANCES[target].ranks
            devices = ranks[-1] if self.now("neuron.lnc") == 1 else ranks[0]
            self.put("trainer.devices", devices, f"--target {target}: devices of an instance")
        if self.options.nodes is not None:
            self.put("trainer.num_nodes", self.options.nodes, f"--nodes {self.options.nodes}")

    def _interpolations(self) -> None:
        """References to what moved follow it; those to what is gone become its value."""
        if not self.moved and not any(entry.action == "dropped" for entry in self.report.entries):
            return
        for node in self.document.nodes():
            if node.value is not None and "${" in node.value:
                text = INTERPOLATION.sub(lambda found, at=node: self._reference(at, found[1]), node.value)  # type: ignore[misc]
                if text != node.value:
                    node.value, node.data = text, (text if isinstance(node.data, str) else node.data)

    def _reference(self, node: Node, name: str) -> str:
        same = f"${{{name}}}"
        origin = node.origin or node.path
        path = _absolute(origin, name)
        if path is None:
            return same
        target = self._where(path)
        if target is None:
            return str(self.was(path, "null")) if self.before.has(path) else same
        if not name.startswith("."):
            return same if target == path else f"${{{target}}}"
        return same if _absolute(node.path, name) == target else f"${{{target}}}"

    def _where(self, path: str) -> str | None:
        """Where a key of the file that was read is now; None if it is gone."""
        if path in self.moved:
            return self.moved[path]
        for node in self.document.nodes():
            if node.origin == path:
                return node.path
        return path if self.document.find(path) is not None or not self.before.has(path) else None

    def _findings(self) -> None:
        """What `nxdt-nemo validate` says of the result, but for keys and files that are still to be given."""
        from nxdt_nemo.config.compose import settle
        from nxdt_nemo.config.validate import validate_config

        cfg = _config(self.document)
        settle(cfg)
        found = validate_config(cfg)
        own = {entry.to for entry in self.report.entries if entry.level == "error"}
        for error in found.errors:
            key = re.split(r"[= ]", error.reason, maxsplit=1)[0]
            if key not in own and not (key.endswith(_FILES) and OmegaConf.select(cfg, key) is None):
                self.report.findings.append(("error", str(error)))


# What whoever starts a run names: a configuration is for more than one data set.
_FILES = (".data_prefix", ".file_names", ".restore_from_path")


def _config(document: Document) -> DictConfig:
    cfg = OmegaConf.create(document.render()) if document.root.children else OmegaConf.create({})
    assert isinstance(cfg, DictConfig)
    return cfg


def _included(document: Document) -> list[str]:
    """Sections that hydra fills from other files: `- .@model.encoder: base` fills model.encoder."""
    node = document.find("defaults")
    found = []
    for entry in node.data if node is not None and isinstance(node.data, list) else ():
        for name in entry if isinstance(entry, dict) else ():
            if "@" in str(name):
                found.append(str(name).partition("@")[2])
    return found


def _absolute(origin: str, name: str) -> str | None:
    """The path that an interpolation at `origin` names; None for a list's element or one above the top."""
    if "[" in name:
        return None
    if not name.startswith("."):
        return name
    dots = len(name) - len(name.lstrip("."))
    parts = origin.split(".")[:-dots]
    return ".".join([*parts, name.lstrip(".")])
