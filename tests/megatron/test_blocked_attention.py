"""The block kernel against softmax(scale Q K^T + bias) V written out in float64, and what it keeps for backward.
Figures are errors / largest element; the reference starts from the same rounded inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from nxdt_nemo.megatron.transformer import blocked_attention as kernel
from nxdt_nemo.megatron.transformer.blocked_attention import HIDDEN, Rule, attend, blocked_attention, merge
from nxdt_nemo.megatron.transformer.packed_sequences import segments_of

B, N, D = 2, 4, 16
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SCALE = 1 / math.sqrt(D)
Found = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One call. rule: Rule's fields; hidden, alibi, biased: which of these tensors it has; packed: lengths."""

    queries: int = 37
    keys: int = 37
    groups: int = N
    rule: tuple[tuple[str, Any], ...] = ()
    positions: bool = False
    hidden: bool = False
    alibi: bool = False
    biased: tuple[int, ...] = ()
    packed: tuple[int, ...] = ()
    dtype: torch.dtype = F32
    values: int = D


def case(**fields: Any) -> Case:
    own = {name: fields.pop(name) for name in list(fields) if name not in ("left", "right", "offset")}
    return Case(**own, rule=tuple(fields.items()))


CASES = {
    "all": case(),
    "causal": case(right=0),
    "causal, groups": case(right=0, groups=2),
    "causal, one group": case(right=0, groups=1),
    "causal, one block": case(right=0, queries=5, keys=5),
    "window": case(left=9, right=0),
    "window of one": case(left=0, right=0),
    "two-sided window, groups": case(left=6, right=3, groups=2),
    "window to the right": case(right=4),
    "more keys": case(queries=11, keys=50),
    "more keys, causal at the end": case(queries=11, keys=50, right=0, offset=39),
    "more keys, a window at the end": case(queries=11, keys=50, left=7, right=0, offset=39),
    "one query": case(queries=1, keys=50, right=0, offset=49),
    "places as values": case(left=9, right=0, positions=True),
    "a mask": case(hidden=True, groups=2),
    "a mask and causal": case(hidden=True, right=0),
    "cross attention, a mask": case(hidden=True, queries=20, keys=45),
    "bias": case(biased=(1, N), groups=2),
    "bias of all, causal": case(biased=(1, 1), right=0),
    "bias of each sample, a mask": case(biased=(B, N), hidden=True),
    "alibi": case(alibi=True, right=0, groups=2),
    "alibi, both ways": case(alibi=True),
    "packed, causal": case(packed=(10, 1, 19, 7), right=0, groups=2),
    "packed, both ways": case(packed=(10, 1, 19, 7)),
    "packed, window": case(packed=(17, 20), left=5, right=0),
    "packed, a rest": case(packed=(10, 20), right=0),
    "values of another size": case(right=0, values=24, groups=2),
}


def tensors(case: Case) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key, value and perhaps a bias; and a direction like the result."""
    torch.manual_seed(3)
    shapes = [(B, N, case.queries, D), (B, case.groups, case.keys, D), (B, case.groups, case.keys, case.values)]
    shapes += [(*case.biased, case.queries, case.keys)] * bool(case.biased)
    made = [(1.5 * torch.randn(shape)).to(case.dtype) for shape in shapes]
    return made, torch.randn(B, N, case.queries, case.values).to(case.dtype)


def rule_of(case: Case) -> Rule:
    rule = Rule(**dict(case.rule))
    if case.positions:
        rule = replace(rule, positions=(torch.arange(case.queries), torch.arange(case.keys)))
    if case.hidden:  # the second sample's first keys, and from its first query all
        hidden = torch.zeros(B, 1, case.queries, case.keys, dtype=torch.bool)
        hidden[1, :, :, :4] = hidden[1, :, 0] = hidden[0, :, 5, ::2] = True
        rule = replace(rule, hidden=hidden)
    if case.alibi:
        rule = replace(rule, slopes=torch.tensor([2.0 ** -(n + 1) for n in range(N)]))
    if case.packed:
        starts = torch.tensor([0, *case.packed], dtype=torch.int32).cumsum(0)
        rule = replace(rule, segments=segments_of(starts, None, case.keys))
    return rule


def formula(case: Case) -> Found:
    """Written out in float64, from the case and not from the rule."""
    made, direction = tensors(case)
    query, key, value, *bias = leaves = [x.double().requires_grad_() for x in made]
    key, value = (x.repeat_interleave(N // case.groups, 1) for x in (key, value))
    scores = SCALE * query @ key.transpose(-1, -2)
    scores = scores + bias[0] if bias else scores
    fields = dict(case.rule)
    here = torch.arange(case.queries)[:, None] + fields.get("offset", 0)
    gap = torch.arange(case.keys) - here
    if case.alibi:
        scores = scores - torch.tensor([2.0 ** -(n + 1) for n in range(N)]).double()[:, None, None] * gap.abs()
    if case.hidden:
        scores = scores.masked_fill(rule_of(case).hidden, HIDDEN)
    unseen = torch.zeros_like(gap, dtype=torch.bool)
    if fields.get("right", -1) >= 0:
        unseen |= gap > fields["right"]
    if fields.get("left", -1) >= 0:
        unseen |= gap < -fields["left"]
    if case.packed:
        rest = case.keys - sum(case.packed)
        names = [number for number, length in enumerate((*case.packed, rest)) for _ in range(length)]
        unseen |= torch.tensor([[a != b for b in names] for a in names])
    y = scores.masked_fill(unseen, -math.inf).softmax(-1) @ value
    names = ("dq", "dk", "dv", "dbias")[: len(leaves)]
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, direction.double()), strict=True))}


def blocked(case: Case, block: int = 8) -> Found:
    made, direction = tensors(case)
    query, key, value, *bias = leaves = [x.requires_grad_() for x in made]
    y = blocked_attention(query, key, value, rule_of(case), SCALE, bias[0] if bias else None, block)
    names = ("dq", "dk", "dv", "dbias")[: len(leaves)]
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, direction), strict=True))}


def errors(found: Found, expected: Found) -> dict[str, float]:
    assert found.keys() == expected.keys()
    result = {}
    for name, reference in expected.items():
        assert found[name].shape == reference.shape
        difference = (found[name].double() - reference.double()).abs().max()
        result[name] = float(difference / reference.double().abs().max().clamp_min(1e-30))
    return result


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    found = errors(blocked(CASES[name]), formula(CASES[name]))
    if name == "window of one":  # no gradient but the value's: what is left are roundings
        found = {key: found[key] for key in ("y", "dv")}
    assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    """The same formula to the last digits: nothing in between is float32."""
    wide = replace(CASES[name], dtype=F64)
    found = errors(blocked(wide), formula(wide))
    if name == "window of one":
        found = {key: found[key] for key in ("y", "dv")}
    assert max(found.values()) <= 1e-14, found


@pytest.mark.parametrize("name", ["all", "causal, groups", "a mask", "packed, causal", "bias"])
def test_bfloat16_rounds_the_results_only(name: str) -> None:
    """2^-8 is a rounding; delta is made from a rounded result, as in the paper."""
    narrow = replace(CASES[name], dtype=BF16)
    found = blocked(narrow)
    assert {x.dtype for x in found.values()} == {BF16}
    assert max(errors(found, formula(narrow)).values()) <= 2**-7


def test_autocast_does_not_reach_the_scores() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = blocked(CASES["causal"])
    assert max(errors(found, formula(CASES["causal"])).values()) <= 1e-6


@pytest.mark.parametrize("block", [1, 5, 37, 64])
def test_the_block_does_not_matter(block: int) -> None:
    for name in ("causal, groups", "two-sided window, groups", "bias of each sample, a mask"):
        found = errors(blocked(CASES[name], block), formula(CASES[name]))
        assert max(found.values()) <= 1e-6, (name, found)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("causal", case(right=1)),
        ("window", case(left=10, right=0)),
        ("packed, causal", case(packed=(10, 1, 18, 8), right=0, groups=2)),
        ("more keys, causal at the end", case(queries=11, keys=50, right=0, offset=38)),
        ("alibi", case(alibi=False, right=0, groups=2)),
        ("a mask", case(hidden=False, groups=2)),
    ],
)
def test_another_rule_would_be_seen(name: str, wrong: Case) -> None:
    assert max(errors(blocked(CASES[name]), formula(wrong)).values()) > 1e-3


# --- rows that see nothing, and parts put together --------------------------------------------------------------------


# --- dropout ---------------------------------------------------------------------------------------------------------

P = 0.3
DROPPED = {"all": {}, "causal": {"right": 0}, "alibi": {"slopes": torch.tensor([2.0 ** -(n + 1) for n in range(N)])}}


def dropped_formula(rule: Rule, groups: int, block: int) -> Found:
    """Written out in float64, with the factors that a generator seeded like the kernel's draws, block by block."""
    made, direction = tensors(Case(groups=groups, dtype=F64))
    leaves = [x.requires_grad_() for x in made]
    key, value = (x.repeat_interleave(N // groups, 1) for x in leaves[1:])
    gap = torch.arange(37) - torch.arange(37)[:, None]
    scores = SCALE * leaves[0] @ key.transpose(-1, -2)
    if rule.slopes is not None:
        scores = scores - rule.slopes.double()[:, None, None] * gap.abs()
    if rule.right == 0:
        scores = scores.masked_fill(gap > 0, -math.inf)
    torch.manual_seed(8)
    rows = []
    for start in range(0, 37, block):
        stop = min(start + block, 37)
        seen = stop if rule.right == 0 else 37
        drawn = torch.empty(B, groups, N // groups, stop - start, seen, dtype=F64).bernoulli_(1 - P) / (1 - P)
        rows.append(torch.nn.functional.pad(drawn.flatten(1, 2), (0, 37 - seen)))
    y = scores.softmax(-1) * torch.cat(rows, 2) @ value
    return {"y": y.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(y, leaves, direction), strict=True))}


def dropped(rule: Rule, groups: int, block: int) -> Found:
    made, direction = tensors(Case(groups=groups, dtype=F64))
    leaves = [x.requires_grad_() for x in made]
    torch.manual_seed(8)
    y = blocked_attention(*leaves, replace(rule, dropout=P), SCALE, block=block)
    after = torch.get_rng_state()
    gradients = torch.autograd.grad(y, leaves, direction)
    assert torch.equal(torch.get_rng_state(), after), "backward draws nothing that forward did not"
    return {"y": y.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("groups", [N, 2])
@pytest.mark.parametrize("name", DROPPED)
def test_dropout(name: str, groups: int, block: int) -> None:
    rule = Rule(**DROPPED[name])
    found = errors(dropped(rule, groups, block), dropped_formula(rule, groups, block))
    assert max(found.values()) <= 1e-13, found


def test_other_draws_in_backward_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "the_same_draws", lambda start: torch.random.fork_rng(devices=[]))
    found = errors(dropped(Rule(right=0), N, 8), dropped_formula(Rule(right=0), N, 8))
    assert {name for name, error in found.items() if error > 1e-2} == {"dq", "dk", "dv"}


def test_so_much_is_dropped_and_differently_in_each_call() -> None:
    """Of equal probabilities with values 1, what is left of a row is how many stayed."""
    zeros, ones = torch.zeros(1, N, 64, D), torch.ones(1, N, 64, D)
    torch.manual_seed(1)
    one, other = (blocked_attention(zeros, zeros, ones, Rule(dropout=P), SCALE, block=16)[..., 0] for _ in range(2))
    assert not torch.equal(one, other) and one.flatten().unique().numel() > 10
    assert abs(float(one.mean()) - 1) < 0.02 and float(one.std()) == pytest.approx((P / (1 - P) / 64) ** 0.5, rel=0.15)


def test_a_row_that_sees_nothing_is_zero_and_so_are_its_gradients() -> None:
    lone = case(right=0, offset=-3)  # the first three queries stand before the first key
    made, direction = tensors(lone)
    leaves = [x.requires_grad_() for x in made]
    y = blocked_attention(*leaves, rule_of(lone), SCALE, block=2)
    gradients = torch.autograd.grad(y, leaves, direction)
    assert all(x.isfinite().all() for x in (y, *gradients))
    assert not y[:, :, :3].any() and not gradients[0][:, :, :3].any()
    assert y[:, :, 3:].any(-1).all()
    lse = attend(*made, rule_of(lone), SCALE)[1]
    assert (lse[:, :, :3] == -math.inf).all() and lse[:, :, 3:].isfinite().all()


def test_keys_in_two_parts_merge_to_the_whole() -> None:
    """Rows that see nothing in a part, or in either, among them."""
    made, _ = tensors(case())
    query, key, value = (x.double() for x in made)
    places = torch.arange(37) - 2
    whole = Rule(right=0, positions=(places, torch.arange(37)))
    parts = []
    for keys in (slice(20, 37), slice(0, 20)):
        rule = replace(whole, positions=(places, torch.arange(37)[keys]))
        parts.append(attend(query, key[:, :, keys], value[:, :, keys], rule, SCALE, block=8))
    out, lse = merge(*parts)
    expected = attend(query, key, value, whole, SCALE)
    assert (expected[1][:, :, :2] == -math.inf).all()
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-14)


# --- packed sequences ----------------------------------------------------------------------------------------------


def test_segments() -> None:
    starts = torch.tensor([0, 4, 4, 10], dtype=torch.int32)
    queries, keys = segments_of(starts, None, 12)
    assert queries.tolist() == keys.tolist() == [0] * 4 + [2] * 6 + [3] * 2
    queries, keys = segments_of(starts, torch.tensor([0, 3, 3, 8], dtype=torch.int32), 12)
    assert queries.tolist() == [0] * 4 + [2] * 6 + [3] * 2
    assert keys.tolist() == [0] * 3 + [-1] + [2] * 5 + [-1] + [3] * 2


# --- memory --------------------------------------------------------------------------------------------------------


def saved(length: int, dtype: torch.dtype = F32, **fields: Any) -> dict[int, int]:
    """Bytes of each tensor that is kept for backward."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    long = case(queries=length, keys=length, dtype=dtype, **fields)
    leaves = [x.requires_grad_() for x in tensors(long)[0]]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        blocked_attention(*leaves, rule_of(long), SCALE, block=32)
    return sizes


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("fields", [{}, {"right": 0, "groups": 2}, {"left": 20, "right": 0}], ids=str)
def test_what_is_kept_is_linear_in_the_sequence(fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Query, key, value and result, and one float32 a row: to the byte."""
    for length in (96, 192):
        row = B * length * D * dtype.itemsize
        sizes = saved(length, dtype, **fields)
        assert sum(sizes.values()) == (2 * N + 2 * fields.get("groups", N)) * row + B * N * length * 4
        assert len(sizes) == 5


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_result_is_laid_out_as_the_next_layer_takes_it(dtype: torch.dtype) -> None:
    """[S, B, N E] is a view of it, so that the two keep one tensor."""
    query, key, value = (x.requires_grad_() for x in tensors(case(dtype=dtype))[0])
    out = blocked_attention(query, key, value, Rule(right=0), SCALE)
    taken = out.permute(2, 0, 1, 3).flatten(2)
    assert taken.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()


def test_no_more_than_a_block_of_scores_lives_at_a_time() -> None:
    """The largest tensor that any operation makes, forward and backward, grows with the sequence and not its square."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.size = max([self.size, *(x.numel() for x in made)])
            return out

    def largest(length: int) -> int:
        long = case(queries=length, keys=length, right=0)
        made, direction = tensors(long)
        leaves = [x.requires_grad_() for x in made]
        with Largest() as mode:
            torch.autograd.grad(blocked_attention(*leaves, rule_of(long), SCALE, block=32), leaves, direction)
        return mode.size

    assert largest(128) == B * N * 32 * 128
    assert largest(256) == B * N * 32 * 256
