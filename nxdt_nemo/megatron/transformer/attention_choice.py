"""Which implementation computes a call of core attention, and why.

Room megatron/. The table of docs/attention.md, as data: the first row that fits a call is taken.
Proof: tests/megatron/test_attention_choice.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from nxdt_nemo.errors import ConfigError
from nxdt_nemo.megatron.transformer import nki_flash

__all__ = ["LONG", "REFUSALS", "ROWS", "Call", "Choice", "Name", "choose"]

LONG = 2048
"""Keys from which on scores [B, N, S, T] are no longer made whole."""

Name = Literal["upstream", "sdpa", "blocked", "nki_flash", "ring", "all_to_all", "all_gather"]


class Choice(NamedTuple):
    """An implementation and why it is the one."""

    name: Name
    reason: str


@dataclass(frozen=True)
class Call:
    """What a choice depends on: sizes and settings, never values. Sizes are a rank's own.

    causal   the layer is causal and nobody handed in a mask
    masked, biased, packed   a mask, an additive bias, packed sequences are handed in
    alibi    distances are taken from the scores
    window   the configuration has a window_size
    dropout  probabilities are dropped in this call
    parts    ranks that the sequence is cut among; comm is how they talk (cp_comm_type)
    """

    lane: str
    dtype: torch.dtype
    queries: int
    keys: int
    heads: int
    groups: int
    features: int
    values: int
    causal: bool
    masked: bool = False
    biased: bool = False
    alibi: bool = False
    packed: bool = False
    window: bool = False
    dropout: bool = False
    parts: int = 1
    comm: str = "p2p"

    @property
    def plain(self) -> bool:
        """Causal self attention and nothing else."""
        return (
            self.causal and self.queries == self.keys and not (self.biased or self.alibi or self.packed or self.window)
        )

    @property
    def kernel_misfit(self) -> str:
        """Why the NKI kernels cannot be used; "" if they can."""
        if self.lane == "cpu":
            return "the cpu lane has no NeuronCore"
        return nki_flash.kernels().missing or nki_flash.misfit(
            self.queries, self.keys, self.features, self.values, self.dtype
        )


class Row(NamedTuple):
    """A line of the table: its words for the condition are the user's."""

    name: Name
    when: str
    fits: Callable[[Call], bool]
    reason: str


class Refusal(NamedTuple):
    """A call that nothing here computes: the key, its value in the error, and what to do."""

    key: str
    when: str
    fits: Callable[[Call], bool]
    reason: str
    fix: str


REFUSALS = (
    Refusal(
        "model.position_embedding_type",
        "ALiBi with context parallelism",
        lambda call: call.alibi and call.parts > 1,
        "alibi is computed on whole sequences",
        "set model.context_parallel_size=1",
    ),
    Refusal(
        "attention_mask",
        "context parallelism, a mask or a bias",
        lambda call: call.parts > 1 and (call.masked or call.biased),
        "with context_parallel_size={parts} the layer's own mask type and packed sequences are what hides tokens",
        "hand in no mask (model.get_attention_mask_from_fusion=True) and no bias",
    ),
    Refusal(
        "model.cp_comm_type",
        "context parallelism, another cp_comm_type",
        lambda call: call.parts > 1 and call.comm not in ("p2p", "a2a", "all_gather"),
        "{comm!r} is not available on this backend",
        "use p2p, a2a or all_gather",
    ),
    Refusal(
        "model.cp_comm_type",
        "a2a, heads or key groups that the ranks do not divide",
        lambda call: (
            call.parts > 1 and call.comm == "a2a" and bool(call.heads % call.parts or call.groups % call.parts)
        ),
        "a2a cuts {heads} heads and {groups} key groups of a tensor-parallel rank among {parts} ranks",
        "use p2p or all_gather",
    ),
)

ROWS = (
    Row(
        "ring",
        "context parallelism, cp_comm_type p2p (the default)",
        lambda call: call.parts > 1 and call.comm == "p2p",
        "keys and values travel, no rank ever holds the whole sequence",
    ),
    Row(
        "all_to_all",
        "context parallelism, cp_comm_type a2a",
        lambda call: call.parts > 1 and call.comm == "a2a",
        "each rank has all tokens of some heads",
    ),
    Row(
        "all_gather",
        "context parallelism, cp_comm_type all_gather",
        lambda call: call.parts > 1 and call.comm == "all_gather",
        "each rank has all keys and values for a while, in one exchange",
    ),
    Row(
        "upstream",
        "dropout in training, without ALiBi and additive bias",
        lambda call: call.dropout and not (call.alibi or call.biased),
        "a resumed run must draw the random numbers that the first one drew",
    ),
    Row(
        "upstream",
        "causal, more than one query but not as many as keys",
        lambda call: call.causal and not call.packed and call.queries not in (1, call.keys),
        "upstream refuses it",
    ),
    Row(
        "blocked",
        "packed sequences, window_size, ALiBi or an additive bias",
        lambda call: call.packed or call.window or call.alibi or call.biased,
        "upstream's local attention has none of these",
    ),
    Row(
        "nki_flash",
        "causal, a Neuron lane with NKI kernels, sequence a multiple of 2048, up to 128 features a head",
        lambda call: call.plain and not call.kernel_misfit,
        "the compiler's own kernel",
    ),
    Row(
        "sdpa",
        "causal, on the cpu lane, or short",
        lambda call: call.plain and (call.lane == "cpu" or call.keys < LONG),
        "exact, and on the host torch's kernel keeps no scores; a traced lane lowers it to plain products",
    ),
    Row(
        "blocked",
        f"{LONG} keys or more: a mask, both ways, cross attention; causal on a traced lane",
        lambda call: call.keys >= LONG,
        "scores of a block at a time",
    ),
    Row(
        "upstream",
        "the rest: short, with a mask, both ways, one query",
        lambda call: True,
        "to the bit what megatron-core computes",
    ),
)


@functools.lru_cache(maxsize=256)
def choose(call: Call) -> Choice:
    """The implementation for a call. Raises ConfigError, naming the key, for one that nothing here computes."""
    for refusal in REFUSALS:
        if refusal.fits(call):
            raise ConfigError(refusal.reason.format(**vars(call)), place=refusal.key, fix=refusal.fix)
    row = next(row for row in ROWS if row.fits(call))
    return Choice(row.name, f"{row.when}: {row.reason}")
