"""What a family file says.

Room checkpoint/ (leaf). May import this room. Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Dialect
from nxdt_nemo.errors import UserError

__all__ = ["Config", "Family", "need"]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A family of models.

    rows     Hugging Face's keys; together they name all logical tensors of the family
    ignored  keys, as regular expressions, of Hugging Face files that hold nothing to keep
    from_hf  config.json as a Model
    to_hf    a Model as config.json
    is_it    True if a Model read from elsewhere is one of this family
    """

    name: str
    model_types: tuple[str, ...]
    rows: Dialect
    from_hf: Callable[[Config], Model]
    to_hf: Callable[[Model], dict[str, Any]]
    is_it: Callable[[Model], bool]
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq", r"(.*\.)?position_ids")

    def names(self, model: Model) -> frozenset[str]:
        """Patterns of the logical tensors that a model has."""
        rows = (row for row in self.rows if row.when(model, Layout()))
        return frozenset(name for row in rows for name in row.how.names)


def need(config: Config, *names: str) -> int:
    """The first of these keys that is there, a whole number. Raises UserError naming it."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            raise UserError(f"{name}={value!r} is not a whole number", place="config.json")
    raise UserError(f"has no {names[0]}", place="config.json", fix="take the file that belongs to the weights")
