"""Attention over a sequence that is cut among the ranks of a context-parallel group.

Room megatron/. Stands in for the context parallelism of TransformerEngine's DotProductAttention; `cp_comm_type` names
are upstream's. Built on blocked_attention.py and the runtime's collectives.
Proof: tests/megatron/test_context_parallel.py.

    p2p         K/V go round the ring of ranks, results are merged by log-sum-exp; in backward dK/dV travel with them.
                Liu et al. 2023, arXiv:2310.01889; the cut in 2p chunks evens the work out (packed_sequences.py).
    a2a         tokens become whole and heads are cut, by all-to-all. Jacobs et al. 2023, arXiv:2309.14509.
    all_gather  K/V are gathered, in backward anew, and their gradients reduce-scattered. Grattafiori et al. 2024,
                arXiv:2407.21783, section 3.3.2.

Every rank runs the same calls with the same shapes: which of its two chunks a call is about is a `where` on the rank
as a value. In a causal ring, step i > 0 brings chunks s and 2p - 1 - s of rank s = r - i: a rank's late queries see
the early keys; then the early queries see the early keys if s < r, otherwise the late queries see the late keys. Both
are calls of c queries and c keys without a causal mask, and no rank waits for another's longer call.

L = 2c a rank's tokens, early chunk first. Bytes received a rank in forward, n those of its K and V: p2p and all_gather
n * (p - 1); a2a those of Q, K, V and the result * (p - 1) / p. Backward: K/V again, and dK/dV in the dtype of the
arithmetic, as often; a2a as in forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nxdt_nemo.megatron.transformer.blocked_attention import (
    Rule,
    attend,
    attend_backward,
    by_token,
    merge,
    row_products,
    start_of_draws,
    the_same_draws,
)
from nxdt_nemo.megatron.transformer.packed_sequences import Chunks
from nxdt_nemo.runtime.collectives import reshard
from nxdt_nemo.runtime.groups import Group

__all__ = ["all_gather_attention", "all_to_all_attention", "ring_attention"]

Core = Callable[[Tensor, Tensor, Tensor, Rule], Tensor]


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, scale: float, chunks: Chunks, group: Group
) -> Tensor:
    """[B, N, L, E] from query [B, N, L, D], key [B, G, L, D] and value [B, G, L, E], in chunk order.

    rule  its bounds and dropout only; places and segments are those of chunks
    """
    out: Tensor = _Ring.apply(query, key, value, rule, scale, chunks, group)  # type: ignore[no-untyped-call]
    return out


def all_gather_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, scale: float, chunks: Chunks, group: Group
) -> Tensor:
    """As ring_attention."""
    out: Tensor = _AllGather.apply(query, key, value, rule, scale, chunks, group)  # type: ignore[no-untyped-call]
    return out


def all_to_all_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, core: Core, chunks: Chunks, group: Group
) -> Tensor:
    """As ring_attention; the group's size divides N and G.

    core  attention over all tokens in chunk order, given the rule that holds there
    """
    query, key, value = (_ordered(reshard(x, 2, 1, group), group.size) for x in (query, key, value))
    out = core(query, key, value, _rule_of_all(rule, chunks))
    return reshard(_by_rank(out, group.size), 1, 2, group)


class _Ring(torch.autograd.Function):
    """K/V visit: at step i those of the rank i places before."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rule: Rule, scale: float, chunks: Chunks, group: Group
    ) -> Tensor:
        ctx.start, found = start_of_draws(rule), None
        for pieces, here in _visits(torch.cat((key, value), -1), rule, chunks, group):
            found = _attended(query, here, pieces, scale, found)
        return _saved(ctx, query, key, value, found, (rule, scale, chunks, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        rule, scale, chunks, group = ctx.rest
        rows = lse, row_products(grad, out, lse.dtype), grad
        of_query, mine, travelling = None, None, None
        with the_same_draws(ctx.start):
            for pieces, here in _visits(torch.cat((key, value), -1), rule, chunks, group):
                for_query, terms = _backward(query, here, key.shape[-1], rows, pieces, scale)
                of_query = for_query if of_query is None else of_query + for_query
                if mine is None:  # these need no journey
                    mine = terms
                else:
                    travelling = terms if travelling is None else _next(travelling, group) + terms
        assert of_query is not None and mine is not None, "a group has a rank"
        if travelling is not None:  # the last step of the round takes them home
            mine = mine + _next(travelling, group)
        return _given(ctx, of_query, mine)


class _AllGather(torch.autograd.Function):
    """K/V of all ranks, in one step."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rule: Rule, scale: float, chunks: Chunks, group: Group
    ) -> Tensor:
        ctx.start = start_of_draws(rule)
        found = _attended(query, _whole(key, value, group), _gathered_pieces(rule, chunks, group), scale)
        return _saved(ctx, query, key, value, found, (rule, scale, chunks, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        rule, scale, chunks, group = ctx.rest
        rows = lse, row_products(grad, out, lse.dtype), grad
        pieces, whole = _gathered_pieces(rule, chunks, group), _whole(key, value, group)
        with the_same_draws(ctx.start):
            of_query, terms = _backward(query, whole, key.shape[-1], rows, pieces, scale)
        return _given(ctx, of_query, group.ops.reduce_scatter(_by_rank(terms, group.size), 2, group))


Found = tuple[Tensor, Tensor]


def _saved(ctx: Any, query: Tensor, key: Tensor, value: Tensor, found: Found | None, rest: tuple[Any, ...]) -> Tensor:
    assert found is not None, "a group has a rank"
    out, lse = by_token(found[0], query.dtype), found[1]
    ctx.save_for_backward(query, key, value, out, lse)
    ctx.rest = rest
    return out


def _given(ctx: Any, of_query: Tensor, of_both: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, *_ = ctx.saved_tensors
    of_key, of_value = of_both.split((key.shape[-1], value.shape[-1]), -1)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None, None, None, None


# --- which calls, and between whom ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Tokens of an early and a late half: both, or one; which one is "chosen" is a value."""

    half: Literal["both", "early", "late", "chosen"]
    early: Tensor | None = None
    """[1], of "chosen": true if it is the early one."""

    def take(self, x: Tensor, dim: int = 2) -> Tensor:
        if self.half == "both":
            return x
        early, late = x.chunk(2, dim)
        if self.early is not None:
            return torch.where(self.early, early, late)
        return early if self.half == "early" else late

    def put(self, x: Tensor, other: float = 0.0) -> Tensor:
        """x in its place along dim 2, `other` in the other half's."""
        if self.half == "both":
            return x
        rest = torch.full_like(x, other)
        if self.early is not None:
            return torch.cat((torch.where(self.early, x, rest), torch.where(self.early, rest, x)), 2)
        return torch.cat((x, rest) if self.half == "early" else (rest, x), 2)


BOTH, EARLY, LATE = _Part("both"), _Part("early"), _Part("late")


@dataclass(frozen=True)
class _Piece:
    """One call of the block kernel: these queries of mine, these keys of what is here, this rule between them."""

    queries: _Part
    keys: _Part
    rule: Rule


@dataclass(frozen=True)
class _Tokens:
    """Places and segments of some tokens; None where no rule asks for them."""

    positions: Tensor | None
    queries: Tensor | None
    keys: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> _Tokens:
        return _Tokens(*(None if x is None else function(x) for x in (self.positions, self.queries, self.keys)))


def _piece(queries: _Part, keys: _Part, rule: Rule, mine: _Tokens, here: _Tokens) -> _Piece:
    mine, here = mine.map(lambda x: queries.take(x, 0)), here.map(lambda x: keys.take(x, 0))
    positions, segments = _pair(mine.positions, here.positions), _pair(mine.queries, here.keys)
    return _Piece(queries, keys, replace(rule, positions=positions, segments=segments))


def _pair(mine: Tensor | None, here: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if mine is None or here is None else (mine, here)


def _counts(rule: Rule) -> bool:
    """Does the rule count tokens? A causal one only orders them, as chunks, early and late, are ordered."""
    return rule.left >= 0 or rule.right > 0


def _rule_of_all(rule: Rule, chunks: Chunks) -> Rule:
    """The rule between all tokens in chunk order. A single sequence's places are there what indices are."""
    tokens = _Tokens(chunks.positions if _counts(rule) and chunks.queries is not None else None, *_segments(chunks))
    flat = tokens.map(lambda x: x.flatten())
    return _piece(BOTH, BOTH, rule, flat, flat).rule


def _visits(both: Tensor, rule: Rule, chunks: Chunks, group: Group) -> Iterable[tuple[list[_Piece], Tensor]]:
    """The ring: each step's calls, and the K/V that are here."""
    tokens = _Tokens(chunks.positions if _counts(rule) else None, *_segments(chunks)).map(_rows)
    rank, mine = _row(torch.arange(group.size, device=both.device), 0, group), tokens.map(lambda x: _row(x, 0, group))
    unordered = replace(rule, right=-1)
    for step in range(group.size):
        here = tokens.map(lambda x, step=step: _row(x, step, group))  # type: ignore[misc]
        both = both if step == 0 else _next(both, group)
        if rule.right != 0 or step == 0:
            yield [_piece(BOTH, BOTH, rule, mine, here)], both
        else:
            visitor = _row(torch.arange(group.size, device=both.device), step, group)
            chosen = _Part("chosen", (visitor < rank).reshape(1))
            parts = ((LATE, EARLY), (chosen, chosen))
            yield [_piece(queries, keys, unordered, mine, here) for queries, keys in parts], both


def _gathered_pieces(rule: Rule, chunks: Chunks, group: Group) -> list[_Piece]:
    """Between mine and all in chunk order. No rank's early queries see a later half of all keys under a causal rule."""
    bounded = rule.right == 0 or _counts(rule)
    tokens = _Tokens(chunks.positions if bounded else None, *_segments(chunks))
    mine, here = tokens.map(lambda x: _row(_rows(x), 0, group)), tokens.map(lambda x: x.flatten())
    parts = ((EARLY, EARLY), (LATE, BOTH)) if rule.right == 0 else ((BOTH, BOTH),)
    return [_piece(queries, keys, rule, mine, here) for queries, keys in parts]


def _segments(chunks: Chunks) -> tuple[Tensor | None, Tensor | None]:
    return chunks.queries, chunks.keys


def _rows(chunks: Tensor) -> Tensor:
    """[p, 2c] from [2p, c]: each rank's early and late chunk."""
    early, late = chunks.chunk(2)
    return torch.cat((early, late.flip(0)), 1)


def _row(x: Tensor, back: int, group: Group) -> Tensor:
    """The row of the rank `back` places before this one. The rank is a value here."""
    return group.ops.shard(x.roll(back, 0), 0, group)[0]


# --- what a step does ---------------------------------------------------------------------------------------------


def _attended(query: Tensor, both: Tensor, pieces: list[_Piece], scale: float, found: Found | None = None) -> Found:
    """Result and log-sum-exp [B, N, L] of these pieces, merged with what was found before."""
    for piece in pieces:
        key, value = piece.keys.take(both).split((query.shape[-1], both.shape[-1] - query.shape[-1]), -1)
        out, lse = attend(piece.queries.take(query), key, value, piece.rule, scale)
        fresh = piece.queries.put(out), piece.queries.put(lse, float("-inf"))
        found = fresh if found is None else merge(found, fresh)
    assert found is not None, "a step has a piece"
    return found


def _backward(
    query: Tensor, both: Tensor, features: int, rows: tuple[Tensor, Tensor, Tensor], pieces: list[_Piece], scale: float
) -> tuple[Tensor, Tensor]:
    """Terms of the gradients of my queries [B, N, L, D] and of the K/V that are here, side by side.

    rows  lse, delta and grad, as attend_backward takes them
    """
    of_query, of_both = [], []
    for piece in pieces:
        key, value = piece.keys.take(both).split((features, both.shape[-1] - features), -1)
        lse, delta, grad = (piece.queries.take(x) for x in rows)
        found = attend_backward(piece.queries.take(query), key, value, lse, delta, grad, piece.rule, scale)
        of_query.append(piece.queries.put(found.query))
        of_both.append(piece.keys.put(torch.cat((found.key, found.value), -1)))
    return _sum(of_query), _sum(of_both)


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _next(x: Tensor, group: Group) -> Tensor:
    """To the next rank of the ring, from the one before."""
    return group.ops.permute(x, [(rank, (rank + 1) % group.size) for rank in range(group.size)], group)


def _whole(key: Tensor, value: Tensor, group: Group) -> Tensor:
    """K/V of all ranks, in chunk order."""
    return _ordered(group.ops.all_gather(torch.cat((key, value), -1), 2, group), group.size)


def _ordered(x: Tensor, parts: int) -> Tensor:
    """Chunks in their order along dim 2, from the order of ranks."""
    early, late = x.unflatten(2, (parts, 2, -1)).unbind(3)
    return torch.cat((early, late.flip(2)), 2).flatten(2, 3)


def _by_rank(x: Tensor, parts: int) -> Tensor:
    """The inverse of _ordered."""
    early, late = x.unflatten(2, (2 * parts, -1)).chunk(2, 2)
    return torch.stack((early, late.flip(2)), 3).flatten(2, 4)
