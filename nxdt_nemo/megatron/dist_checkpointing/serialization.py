"""Checkpoints of another expert parallel size: the keys of the optimizer's state begin otherwise there.

Room megatron/. Wraps megatron.core.dist_checkpointing.serialization.load. With expert parallelism megatron-core has an
optimizer of its own for the experts, and the keys of both begin with `chained_N.`; without it none does. What is
written stays upstream's; here it is found under either name. Proof: tests/megatron/test_zero.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase

__all__ = ["load", "renamed"]

CHAINED = re.compile(r"chained_\d+\.")
STATE = "optimizer.state."


def load(
    upstream: Callable[..., Any],
    sharded_state_dict: Any,
    checkpoint_dir: str,
    sharded_strategy: Any = None,
    *others: Any,
    **named: Any,
) -> Any:
    """As upstream; keys of `sharded_state_dict` become those of the checkpoint where only `chained_N.` differs."""
    entries = [entry for entry in nested_values(sharded_state_dict) if isinstance(entry, ShardedBase)]
    states = [entry for entry in entries if _plain(entry.key).startswith(STATE)]
    if states:
        known = serialization.load_tensors_metadata(checkpoint_dir, sharded_strategy)
        names = renamed((entry.key for entry in states), known)
        for entry in states:
            entry.key = names[entry.key]
    return upstream(sharded_state_dict, checkpoint_dir, sharded_strategy, *others, **named)


def renamed(wanted: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Each wanted key's name in a checkpoint with these keys; itself where the checkpoint has none."""
    there = {_plain(key): key for key in known}
    return {key: there.get(_plain(key), key) for key in wanted}


def _plain(key: str) -> str:
    return CHAINED.sub("", key, count=1) if CHAINED.match(key) else key
