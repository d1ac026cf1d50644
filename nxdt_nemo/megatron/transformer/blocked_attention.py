"""Attention in blocks of queries: exact softmax, memory linear in the sequence.

Room megatron/. Stands in for the flash attention that megatron-core takes from TransformerEngine. Plain torch with
its own backward: kept are q, k, v, the result and one number a row; scores live for one block of queries at a time and
are computed anew in backward. `attend` and `attend_backward` know no autograd: context_parallel.py builds on them.
Loops run over Python ints, masks come from comparisons, so a traced lane sees static shapes.
Proof: tests/megatron/test_blocked_attention.py.
Papers: Dao et al. 2022, arXiv:2205.14135 (log-sum-exp form); Dao 2023, arXiv:2307.08691 (backward).

B micro-batch, N heads, G query groups (N = G * R, head g * R + r reads group g), S queries, T keys, D and E features of
a key and of a value. Arithmetic is float32, or float64 for float64 inputs, whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nxdt_nemo.runtime.select import current

__all__ = [
    "BLOCK",
    "HIDDEN",
    "Gradients",
    "Rule",
    "attend",
    "attend_backward",
    "blocked_attention",
    "by_token",
    "merge",
    "row_products",
    "start_of_draws",
    "the_same_draws",
]

BLOCK = 512
"""Queries of a block."""
HIDDEN = -10000.0
"""Upstream's score of a key that the caller's mask hides: a row hidden altogether attends to all keys alike."""


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, and what is added to its scores.

    left, right  a query at place p sees keys at p - left .. p + right; -1: no bound. right=0 is causal. These are
                 megatron-core's `window_size`.
    offset       query i stands at place i + offset, key j at place j, unless positions are given
    positions    places as values, of queries [S] and keys [T], integer. No key is then skipped unseen.
    segments     of queries [S] and keys [T], integer: a query sees keys of its own segment only
    hidden       bool, broadcast to [B, N, S, T]: True makes the score HIDDEN, as upstream's masks do
    slopes       [N] (ALiBi, Press et al. 2021, arXiv:2108.12409): score - slope * |distance|
    dropout      the chance that a probability is left out; those that stay are divided by 1 - dropout. Drawn from the
                 device's generator, block by block: backward has to start from the state that forward started from
    A row that sees nothing at all has the result 0 and the log-sum-exp -inf.
    """

    left: int = -1
    right: int = -1
    offset: int = 0
    positions: tuple[Tensor, Tensor] | None = None
    segments: tuple[Tensor, Tensor] | None = None
    hidden: Tensor | None = None
    slopes: Tensor | None = None
    dropout: float = 0.0

    def columns(self, rows: slice, keys: int) -> slice:
        """The keys that these queries can see: at least one, so that no block is empty."""
        if self.positions is not None:
            return slice(0, keys)
        start = max(0, rows.start + self.offset - self.left) if self.left >= 0 else 0
        stop = min(keys, rows.stop + self.offset + self.right) if self.right >= 0 else keys
        start = min(start, keys - 1)
        return slice(start, max(stop, start + 1))

    def unseen(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """True [rows, columns] where bounds or segments hide a key; None where they hide nothing."""
        found: list[Tensor] = []
        if self._bounds_cut(rows, columns):
            distance = self._distance(rows, columns, device)
            if self.right >= 0:
                found.append(distance > self.right)
            if self.left >= 0:
                found.append(distance < -self.left)
        if self.segments is not None:
            queries, keys = self.segments
            found.append(queries[rows, None] != keys[None, columns])
        return torch.stack(found).any(0) if len(found) > 1 else found[0] if found else None

    def bias(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """ALiBi's term, [N, rows, columns]."""
        if self.slopes is None:
            return None
        return -self.slopes[:, None, None] * self._distance(rows, columns, device).abs()

    def kept(self, weights: Tensor) -> Tensor | None:
        """Factors of these probabilities, 0 or 1 / (1 - dropout), drawn anew; None without dropout."""
        if self.dropout == 0.0:
            return None
        return torch.empty_like(weights).bernoulli_(1.0 - self.dropout).div_(1.0 - self.dropout)

    def _bounds_cut(self, rows: slice, columns: slice) -> bool:
        if self.positions is not None:
            return self.left >= 0 or self.right >= 0
        first, last = rows.start + self.offset, rows.stop - 1 + self.offset
        beyond = self.right >= 0 and columns.stop - 1 > first + self.right
        return beyond or (self.left >= 0 and columns.start < last - self.left)

    def _distance(self, rows: slice, columns: slice, device: torch.device) -> Tensor:
        if self.positions is not None:
            queries, keys = self.positions
            return keys[None, columns] - queries[rows, None]
        queries = torch.arange(rows.start + self.offset, rows.stop + self.offset, device=device)
        return torch.arange(columns.start, columns.stop, device=device) - queries[:, None]


class Gradients(NamedTuple):
    """Of query, key, value and bias (None where there is none), in the dtype of the arithmetic."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    scale: float,
    bias: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """softmax(scale Q K^T + bias) V, differentiable in all four.

    query    [B, N, S, D]; key [B, G, T, D]; value [B, G, T, E]
    bias     [B or 1, N or 1, S or 1, T or 1]
    returns  [B, N, S, E] in the dtype of query
    """
    if bias is not None:
        bias = bias.expand(-1, -1, query.shape[2], key.shape[2])
    out: Tensor = _Blocked.apply(query, key, value, bias, rule, scale, block)  # type: ignore[no-untyped-call]
    return out


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rule: Rule, scale: float, block: int
    ) -> Tensor:
        ctx.start = start_of_draws(rule)
        out, lse = attend(query, key, value, rule, scale, bias, block)
        out = by_token(out, query.dtype)
        ctx.save_for_backward(query, key, value, bias, out, lse)
        ctx.rest = rule, scale, block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, lse = ctx.saved_tensors
        rule, scale, block = ctx.rest
        delta = row_products(grad, out, lse.dtype)
        with the_same_draws(ctx.start):
            found = attend_backward(query, key, value, lse, delta, grad, rule, scale, bias, block)
        inputs = (query, key, value, bias)
        given = (None if x is None or g is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True))
        return (*given, None, None, None)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    scale: float,
    bias: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """The result [B, N, S, E] and the log-sum-exp of its scores [B, N, S], both in the dtype of the arithmetic.

    Shapes as for blocked_attention. No autograd.
    """
    outs, lses = [], []
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        for one in _blocks(query, key, value, rule, scale, bias, block):
            top = one.scores.amax(-1, keepdim=True).clamp_min(torch.finfo(one.scores.dtype).min)
            weights = one.scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            kept = rule.kept(weights)
            weights = weights if kept is None else weights.mul_(kept)
            out = one.join(weights) @ one.value
            outs.append(one.heads(out / one.join(total.masked_fill(total == 0, 1.0))))
            lses.append((top + total.log()).squeeze(-1).flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad: Tensor,
    rule: Rule,
    scale: float,
    bias: Tensor | None = None,
    block: int = BLOCK,
) -> Gradients:
    """The terms of the gradients that go through these keys, of a softmax over these keys and perhaps others.

    lse, delta  [B, N, S], of the whole softmax: its log-sum-exp, and the row products of result and gradient
    grad        [B, N, S, E], of the result
    """
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        wide = lse.clamp_min(torch.finfo(lse.dtype).min)  # a row that sees nothing: exp(-inf - finite) is 0
        queries, biases = [], []
        sums: tuple[Tensor, Tensor] | None = None
        for one in _blocks(query, key, value, rule, scale, bias, block):
            weights = one.scores.sub_(one.split(wide[:, :, one.rows].unsqueeze(-1))).exp_()
            incoming = one.join(one.split(grad[:, :, one.rows].to(weights.dtype)))
            kept = rule.kept(weights)
            of_value = one.join(weights if kept is None else weights * kept).transpose(-1, -2) @ incoming
            slope = (incoming @ one.value.transpose(-1, -2)).view_as(weights)
            slope = slope if kept is None else slope.mul_(kept)
            slope = slope.sub_(one.split(delta[:, :, one.rows].unsqueeze(-1))).mul_(weights)
            if one.hidden is not None:
                slope = slope.masked_fill_(one.hidden, 0.0)  # their scores are constants
            if bias is not None:
                biases.append(_folded(slope.flatten(1, 2), one.columns, key.shape[2], bias))
            joined = one.join(slope)
            queries.append(one.heads(joined @ one.key) * scale)
            of_key = joined.transpose(-1, -2) @ (one.query * scale)
            sums = _added(sums, (of_key, of_value), one.columns, key.shape[2])
        assert sums is not None, "there is at least one block"
        return Gradients(torch.cat(queries, 2), *sums, torch.cat(biases, 2) if biases else None)


def start_of_draws(rule: Rule) -> Tensor | None:
    """What a forward pass keeps so that backward leaves the same probabilities out: the generator's state."""
    return current().rng_state() if rule.dropout else None


@contextmanager
def the_same_draws(start: Tensor | None) -> Iterator[None]:
    """Draw what was drawn from `start` on; the generator goes on afterwards as if nothing had been drawn."""
    if start is None:
        yield
        return
    lane = current()
    now = lane.rng_state()
    lane.set_rng_state(start)
    try:
        yield
    finally:
        lane.set_rng_state(now)


def by_token(out: Tensor, dtype: torch.dtype) -> Tensor:
    """A result [B, N, S, E] in another dtype, laid out as [S, B, N, E].

    The next layer takes it in that order: what it keeps for the backward pass and what attention keeps are one tensor.
    """
    return out.permute(2, 0, 1, 3).to(dtype).contiguous().permute(1, 2, 0, 3)


def row_products(grad: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of grad * out over the features: [B, N, S]."""
    return (grad.to(dtype) * out.to(dtype)).sum(-1)


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two results of attend over different keys as one over all of them."""
    lse = _sum_of_exponentials(one[1], other[1])
    whole = lse.clamp_min(torch.finfo(lse.dtype).min)
    parts = (out * (part - whole).exp().unsqueeze(-1) for out, part in (one, other))
    return sum(parts, torch.zeros((), dtype=lse.dtype, device=lse.device)), lse


def _sum_of_exponentials(one: Tensor, other: Tensor) -> Tensor:
    """torch.logaddexp, -inf of two rows that see nothing included, in operations that XLA has."""
    high, low = torch.maximum(one, other), torch.minimum(one, other)
    return high + (low - high.clamp_min(torch.finfo(high.dtype).min)).exp().log1p()


@dataclass
class _Block:
    """One block of queries against the keys it can see. R queries of a group lie one after the other."""

    rows: slice
    columns: slice
    groups: int
    query: Tensor
    """[B, G, R * rows, D]"""
    key: Tensor
    """[B, G, columns, D]"""
    value: Tensor
    """[B, G, columns, E]"""
    scores: Tensor
    """[B, G, R, rows, columns]"""
    hidden: Tensor | None
    """The caller's mask, broadcast to scores."""

    def split(self, x: Tensor) -> Tensor:
        """[B, G, R, rows, ..] from [B, N, rows, ..]."""
        parts: Tensor = x.unflatten(1, (self.groups, -1))
        return parts

    def join(self, x: Tensor) -> Tensor:
        """[B, G, R * rows, ..] from [B, G, R, rows, ..]."""
        return x.flatten(2, 3)

    def heads(self, x: Tensor) -> Tensor:
        """[B, N, rows, ..] from [B, G, R * rows, ..]."""
        parts: Tensor = x.unflatten(2, (-1, self.rows.stop - self.rows.start))
        return parts.flatten(1, 2)


def _blocks(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, scale: float, bias: Tensor | None, block: int
) -> Iterator[_Block]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    length, groups, device = query.shape[2], key.shape[1], query.device
    key, value = key.to(dtype), value.to(dtype)
    for start in range(0, length, block):
        rows = slice(start, min(start + block, length))
        columns = rule.columns(rows, key.shape[2])
        mine = query[:, :, rows].to(dtype).unflatten(1, (groups, -1)).flatten(2, 3)
        keys = key[:, :, columns]
        scores = (mine * scale @ keys.transpose(-1, -2)).unflatten(2, (-1, rows.stop - rows.start))
        for term in (_cut(bias, rows, columns, groups), _cut(rule.bias(rows, columns, device), None, None, groups)):
            scores = scores if term is None else scores.add_(term)
        hidden, unseen = _cut(rule.hidden, rows, columns, groups), rule.unseen(rows, columns, device)
        if hidden is not None:
            scores = torch.where(hidden, _hidden_score(hidden, unseen, dtype), scores)
        if unseen is not None:
            scores = scores.masked_fill_(unseen, float("-inf"))
        yield _Block(rows, columns, groups, mine, keys, value[:, :, columns], scores, hidden)


def _hidden_score(hidden: Tensor, unseen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """HIDDEN; 0 in a row that is hidden altogether, where softmax knows no difference but a log-sum-exp near -10000
    would leave float32 three decimals."""
    altogether = hidden if unseen is None else hidden | unseen
    return torch.zeros((), dtype=dtype, device=hidden.device).where(altogether.all(-1, keepdim=True), HIDDEN)


def _cut(x: Tensor | None, rows: slice | None, columns: slice | None, groups: int) -> Tensor | None:
    """What of x, broadcast to [B, N, S, T], belongs to a block: broadcast to [B, G, R, rows, columns]."""
    if x is None:
        return None
    x = x[(None,) * (4 - x.dim())]
    if rows is not None and x.shape[2] > 1:
        x = x[:, :, rows]
    if columns is not None and x.shape[3] > 1:
        x = x[..., columns]
    return x.unsqueeze(1) if x.shape[1] == 1 else x.unflatten(1, (groups, -1))


def _folded(slope: Tensor, columns: slice, keys: int, bias: Tensor) -> Tensor:
    """The gradient of one block's rows of a bias, summed over what was broadcast."""
    wide = torch.nn.functional.pad(slope, (columns.start, keys - columns.stop))
    return wide.sum_to_size(bias.shape[0], bias.shape[1], slope.shape[2], keys)


def _added(
    sums: tuple[Tensor, Tensor] | None, terms: tuple[Tensor, Tensor], columns: slice, keys: int
) -> tuple[Tensor, Tensor]:
    """Terms of some keys added to sums over all keys: padded, since a traced lane writes to no part of a tensor."""
    pads = (0, 0, columns.start, keys - columns.stop)
    key, value = (torch.nn.functional.pad(term, pads) for term in terms)
    return (key, value) if sums is None else (sums[0].add_(key), sums[1].add_(value))
