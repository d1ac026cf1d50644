"""Attention over a sequence cut among ranks, against the same attention on one: result and gradients, each method,
causal, both ways, windows, groups and packed sequences. Figures are errors / largest element."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from nxdt_nemo.testing.pytest_plugin import Gloo

pytestmark = pytest.mark.ranks

B, N, D, E, S = 2, 8, 16, 12, 64
F32, F64 = torch.float32, torch.float64
SCALE = 1 / math.sqrt(D)
Found = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One call, by whole tensors. packed: lengths in memory; true: shorter lengths that they hold."""

    comm: str = "p2p"
    groups: int = N
    left: int = -1
    right: int = 0
    packed: tuple[int, ...] = ()
    true: tuple[int, ...] = ()
    dtype: torch.dtype = F32
    fault: str = ""

    @property
    def batch(self) -> int:
        return 1 if self.packed else B


def whole(case: Case) -> list[torch.Tensor]:
    """Query, key, value and a direction like the result, [B, N or G, S, D or E].

    Scores are unit normal: float32 keeps 6e-8 of a score, so with 1.5 times these inputs one rank alone is 8e-7 from
    the formula (plain softmax 5e-7, SDPA 6e-7), and little would be left to see another mistake with.
    """
    torch.manual_seed(5)
    shapes = [(N, D), (case.groups, D), (case.groups, E), (N, E)]
    return [torch.randn(case.batch, heads, S, size).to(case.dtype) for heads, size in shapes]


def cumulated(lengths: tuple[int, ...]) -> torch.Tensor | None:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) if lengths else None


def mine(x: torch.Tensor, case: Case, parts: int, rank: int) -> torch.Tensor:
    """A rank's tokens as upstream hands them out: written here with slices, one sequence after the other."""
    return x[:, :, places(case, parts, rank)]


def places(case: Case, parts: int, rank: int) -> list[int]:
    lengths = (*case.packed, S - sum(case.packed)) if case.packed else (S,)
    found, start = [], 0
    for length in lengths:
        chunk = length // (2 * parts)
        for number in (rank, 2 * parts - 1 - rank):
            first = start + number * chunk
            found += range(first, first + chunk)
        start += length
    return found


def attended(case: Case) -> Found:
    """This rank's result and gradients."""
    import torch.distributed as dist

    from nxdt_nemo.megatron.transformer import context_parallel
    from nxdt_nemo.megatron.transformer.blocked_attention import Rule, blocked_attention
    from nxdt_nemo.megatron.transformer.packed_sequences import chunks_of, local_order
    from nxdt_nemo.runtime.select import current

    group = current().group_of(dist.group.WORLD)
    parts, rank = group.size, group.rank
    size = S // (2 * parts)
    turned = {"no zigzag": (rank + 1) % parts}.get(case.fault, rank)
    *inputs, direction = (mine(x, case, parts, turned) for x in whole(case))
    leaves = [x.clone().requires_grad_() for x in inputs]
    starts, ends = cumulated(case.packed), cumulated(case.true)
    order = None if starts is None else local_order(starts, size, parts)
    query, key, value = leaves if order is None else [x.index_select(2, order.to_chunks) for x in leaves]
    rule, chunks = Rule(case.left, case.right), chunks_of(starts, ends, size, parts, torch.device("cpu"))
    undo = broken(context_parallel, case.fault)
    try:
        if case.comm == "a2a":
            core = lambda q, k, v, inner: blocked_attention(q, k, v, inner, SCALE, block=8)  # noqa: E731
            y = context_parallel.all_to_all_attention(query, key, value, rule, core, chunks, group)
        else:
            names = {"p2p": context_parallel.ring_attention, "all_gather": context_parallel.all_gather_attention}
            y = names[case.comm](query, key, value, rule, SCALE, chunks, group)
        y = y if order is None else y.index_select(2, order.to_thd)
        gradients = torch.autograd.grad(y, leaves, direction)
    finally:
        undo()
    return {"y": y.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def broken(module: Any, fault: str) -> Any:
    """Make a mistake on purpose; returns what takes it back."""
    kept = module._given, module.merge, module._next
    if fault == "gradients of another rank's keys":
        module._given = lambda ctx, query, both: kept[0](ctx, query, kept[2](both, ctx.rest[-1]))
    if fault == "not merged by weight":
        module.merge = lambda one, other: ((one[0] + other[0]) / 2, one[1])

    def undo() -> None:
        module._given, module.merge, module._next = kept

    return undo


def formula(case: Case) -> Found:
    """All tokens at once in float64."""
    *inputs, direction = (x.double() for x in whole(case))
    leaves = [x.requires_grad_() for x in inputs]
    query, key, value = leaves[0], *(x.repeat_interleave(N // case.groups, 1) for x in leaves[1:])
    scores = SCALE * query @ key.transpose(-1, -2)
    gap = torch.arange(S) - torch.arange(S)[:, None]
    unseen = torch.zeros(S, S, dtype=torch.bool)
    if case.right >= 0:
        unseen |= gap > case.right
    if case.left >= 0:
        unseen |= gap < -case.left
    if case.packed:
        lengths = (*case.packed, S - sum(case.packed))
        names = [number for number, length in enumerate(lengths) for _ in range(length)]
        unseen |= torch.tensor([[a != b for b in names] for a in names])
        start = 0
        for length, true in zip(case.packed, case.true, strict=False):
            unseen[:, start + true : start + length] = True
            start += length
    y = scores.masked_fill(unseen, -math.inf).softmax(-1) @ value
    return {"y": y.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(y, leaves, direction), strict=True))}


def errors(parts: list[Found], case: Case) -> dict[str, float]:
    """Each rank's tokens against its share of the whole, padding left out as the loss leaves it out."""
    expected, result = formula(case), {}
    for name, reference in expected.items():
        worst = 0.0
        for rank, found in enumerate(parts):
            share = mine(reference, case, len(parts), rank)
            assert found[name].shape == share.shape and found[name].dtype == case.dtype
            worst = max(worst, float((found[name].double() - share).abs().max()))
        result[name] = worst / float(reference.abs().max())
    return result


CASES = {
    "causal": Case(),
    "groups": Case(groups=4),
    "both ways": Case(right=-1, groups=4),
    "window": Case(left=13, groups=4),
    "window, both ways": Case(left=5, right=9),
    "packed": Case(packed=(16, 32, 16), groups=4),
    "packed, a rest": Case(packed=(8, 24)),
    "packed, padding": Case(packed=(16, 24, 24), true=(13, 24, 17), groups=4),
    "packed, both ways": Case(packed=(16, 32, 16), right=-1),
    "packed, window": Case(packed=(16, 48), left=7, groups=4),
}


@pytest.mark.parametrize("dtype, tolerance", [(F32, 1e-6), (F64, 2e-14)], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("comm", ["p2p", "a2a", "all_gather"])
@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_rank(gloo: Gloo, world: int, comm: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    """float64 tells a wrong formula from a rounding."""
    case = replace(CASES[name], comm=comm, dtype=dtype)
    found = errors(gloo(world, attended, case), case)
    assert max(found.values()) <= tolerance, found


@pytest.mark.parametrize("comm", ["p2p", "all_gather"])
def test_one_key_group(gloo: Gloo, comm: str) -> None:
    case = Case(comm, groups=1)
    assert max(errors(gloo(2, attended, case), case).values()) <= 1e-6


@pytest.mark.parametrize(
    "comm, fault, wrong",
    [
        ("p2p", "gradients of another rank's keys", {"dk", "dv"}),
        ("all_gather", "gradients of another rank's keys", {"dk", "dv"}),
        ("p2p", "not merged by weight", {"y", "dq", "dk", "dv"}),
        ("p2p", "no zigzag", {"y", "dq", "dk", "dv"}),
        ("a2a", "no zigzag", {"y", "dq", "dk", "dv"}),
        ("all_gather", "no zigzag", {"y", "dq", "dk", "dv"}),
    ],
)
def test_a_mistake_would_be_seen(gloo: Gloo, comm: str, fault: str, wrong: set[str]) -> None:
    case = Case(comm, groups=4, fault=fault)
    found = errors(gloo(2, attended, case), case)
    assert {name for name, error in found.items() if error > 1e-3} == wrong, found
