"""docs/migrate_keys.md, from the table of rules.

Room config/ (leaf). `python -m nxdt_nemo.config.migrate.page` prints it; tests/config/migrate/test_page.py says when
the page is not the table's. Imports the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator

from nxdt_nemo.config.migrate.derive import PRECISIONS, TRAINING_PRECISIONS
from nxdt_nemo.config.migrate.rules import DIALECTS, Rule, table

__all__ = ["page"]

WHAT = {
    "keep": "kept",
    "move": "moved",
    "rename": "renamed",
    "map": "value mapped",
    "drop": "dropped",
    "derive": "derived",
    "default": "added",
    "warn": "kept, warning",
    "error": "kept, error",
}
HEAD = """# Every key of a migration

What `nxdt-nemo migrate` does to a key, from the rules in `configs/migrate/`: this page is made from them
(`python -m nxdt_nemo.config.migrate.page > docs/migrate_keys.md`). How to migrate: [migrate.md](migrate.md). The first
rule that fits a key is its rule; a key's dialects are those of its section, or those in brackets. `*` is one name, `**`
any path. Derived means that a function works it out of several keys (`nxdt_nemo/config/migrate/derive.py`).
`T/` is aws-neuron/neuronx-distributed-training, `N/` aws-neuron/neuronx-nemo-megatron, `C/` NxD Core.
"""
TITLES = {
    "10_nxdt.toml": f"NxD Training: {DIALECTS['nxdt'].partition(': ')[2]}",
    "20_nnm.toml": f"NNM: {DIALECTS['nnm'].partition(': ')[2]}",
    "30_nemo.toml": "NeMo's own keys, in all dialects",
    "40_defaults.toml": "Added where they are absent",
}


def page() -> str:
    """The page as Markdown."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield HEAD
    for file, title in TITLES.items():
        yield f"## {title}\n"
        yield "| Key | What | Here | Because |"
        yield "|---|---|---|---|"
        rules = [rule for rule in table() if rule.file == file]
        usual = max((rule.dialect for rule in rules), key=[rule.dialect for rule in rules].count)
        yield from (_row(rule, usual) for rule in rules)
        yield ""
    yield "## Precision\n"
    yield "NxD Training's `precision.type` (`manual` is worked out of its own keys) and NNM's `training_precision`.\n"
    yield "| Theirs | `trainer.precision` | `model.megatron_amp_O2` | `neuron.stochastic_rounding` | ZeRO-1 | Note |"
    yield "|---|---|---|---|---|---|"
    for name, (precision, masters, rounding, note) in PRECISIONS.items():
        yield f"| `precision.type: {name}` | {precision} | {masters} | {rounding or ''} | `zero1` | {note} |"
    for name, ((precision, masters, rounding, note), zero, _) in TRAINING_PRECISIONS.items():
        yield f"| `training_precision={name}` | {precision} | {masters} | {rounding or ''} | {zero} | {note} |"


def _row(rule: Rule, usual: tuple[str, ...]) -> str:
    keys = ", ".join(f"`{key}`" for key in rule.key)
    if rule.dialect != usual:
        keys += f" [{', '.join(rule.dialect)}]"
    if rule.when:
        keys += f" = {', '.join(_value(value) for value in rule.when)}"
    if rule.known:
        keys += " that NeMo 2.4 reads"
    here = f"`{rule.to}`" if rule.to else ""
    if rule.action == "default":
        here = f"`{_value(rule.value)}`"
    if rule.values:
        pairs = ", ".join(f"{_value(theirs)} → {_value(ours)}" for theirs, ours in rule.values)
        here = f"{here}: {pairs}".lstrip(": ")
    source = f" ({rule.source})" if rule.source else ""
    return f"| {keys} | {WHAT[rule.action]} | {here} | {rule.why}{source} |"


def _value(value: object) -> str:
    return "null" if value is None else str(value)


if __name__ == "__main__":
    print(page(), end="")
