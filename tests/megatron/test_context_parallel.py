"""Attention over a sequence cut among ranks, against the same attention on one: result and gradients, each method,
causal, both ways, windows, groups and packed sequences. Figures are errors / largest element."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
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


def slopes(comm: str, fault: str) -> tuple[float, float, float]:
    """With dropout: the derivative of this rank's <result, direction> along a change of all inputs, by central
    differences and by the gradients; summed over ranks the two agree. And the mean of the result for values of 1."""
    import torch.distributed as dist

    from nxdt_nemo.megatron.transformer import context_parallel
    from nxdt_nemo.megatron.transformer.blocked_attention import Rule, blocked_attention
    from nxdt_nemo.megatron.transformer.packed_sequences import chunks_of
    from nxdt_nemo.runtime.select import current

    case, group = Case(comm, groups=4, dtype=F64), current().group_of(dist.group.WORLD)
    chunks = chunks_of(None, None, S // (2 * group.size), group.size, torch.device("cpu"))
    *inputs, direction = (mine(x, case, group.size, group.rank) for x in whole(case))
    change = [torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(group.rank)) for x in inputs]
    rule = Rule(right=0, dropout=0.3)

    def result(*heads: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(11)  # ranks draw the same numbers, as Megatron's stream makes them
        if comm == "a2a":
            core = lambda q, k, v, inner: blocked_attention(q, k, v, inner, SCALE, block=8)  # noqa: E731
            return context_parallel.all_to_all_attention(*heads, rule, core, chunks, group)
        run = {"p2p": context_parallel.ring_attention, "all_gather": context_parallel.all_gather_attention}[comm]
        return run(*heads, rule, SCALE, chunks, group)

    leaves = [x.clone().requires_grad_() for x in inputs]
    y = result(*leaves)
    same = context_parallel.the_same_draws
    if fault:
        context_parallel.the_same_draws = lambda start: torch.random.fork_rng(devices=[])
    try:
        gradients = torch.autograd.grad(y, leaves, direction)
    finally:
        context_parallel.the_same_draws = same
    ahead, behind = (result(*(x + sign * 1e-5 * d for x, d in zip(inputs, change, strict=True))) for sign in (1, -1))
    measured = float(((ahead - behind) / 2e-5 * direction).sum())
    mean = float(result(*inputs[:2], torch.ones_like(inputs[2])).mean())
    return measured, sum(float((g * d).sum()) for g, d in zip(gradients, change, strict=True)), mean


@pytest.mark.parametrize("comm", ["p2p", "a2a", "all_gather"])
@pytest.mark.parametrize("world", [2, 4])
def test_dropout(gloo: Gloo, world: int, comm: str) -> None:
    """Backward leaves out what forward left out, and what stays is as much as all was."""
    measured, computed, means = (list(x) for x in zip(*gloo(world, slopes, comm, ""), strict=True))
    assert sum(computed) == pytest.approx(sum(measured), rel=1e-8)
    assert sum(means) / world == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("comm", ["p2p", "all_gather"])
def test_other_draws_in_backward_would_be_seen(gloo: Gloo, comm: str) -> None:
    measured, computed, _ = (sum(x) for x in zip(*gloo(2, slopes, comm, "other draws"), strict=True))
    assert computed != pytest.approx(measured, rel=1e-3)


def kept(comm: str) -> tuple[int, int]:
    """Bytes that a rank keeps for backward: of tensors as long as its own tokens, and of all."""
    import torch.distributed as dist

    from nxdt_nemo.megatron.transformer import context_parallel
    from nxdt_nemo.megatron.transformer.blocked_attention import Rule
    from nxdt_nemo.megatron.transformer.packed_sequences import chunks_of
    from nxdt_nemo.runtime.select import current

    group, sizes = current().group_of(dist.group.WORLD), {}
    case = Case(comm, groups=4)
    leaves = [mine(x, case, group.size, group.rank).clone().requires_grad_() for x in whole(case)[:3]]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    method = {"p2p": context_parallel.ring_attention, "all_gather": context_parallel.all_gather_attention}[comm]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunks = chunks_of(None, None, S // (2 * group.size), group.size, torch.device("cpu"))
        method(*leaves, Rule(right=0), SCALE, chunks, group)
    return len(sizes), sum(sizes.values())


@pytest.mark.parametrize("comm", ["p2p", "all_gather"])
def test_a_rank_keeps_its_own_tokens_only(gloo: Gloo, comm: str) -> None:
    """Query, key, value, result and one number a row, to the byte."""
    for world in (2, 4):
        tokens = B * S // world * 4
        assert gloo(world, kept, comm) == [(5, tokens * (N * D + 4 * D + 4 * E + N * E + N))] * world


# --- a whole model ----------------------------------------------------------------------------------------------------

LENGTHS = (16, 32, 16)  # packed


@dataclass(frozen=True)
class Model:
    """A tiny GPT in context parallelism. mask: what the loader hands to a causal layer; "more" hides further tokens."""

    family: Literal["gpt", "llama"] = "llama"
    comm: str | None = None
    packed: bool = False
    recompute: bool = False
    zigzag: bool = True
    mask: Literal["", "causal", "more"] = ""


def trained(model: Model) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one batch and every gradient, summed over the ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from nxdt_nemo.testing.ours import forget_groups

    forget_groups()  # of another test in this pool
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    try:
        made, (batch, extra) = gpt(model), share(model)
        losses = made(batch["tokens"], batch["positions"], batch.get("attention_mask"), labels=batch["labels"], **extra)
        loss = losses.sum() / (losses.numel() * dist.get_world_size())
        loss.backward()
        gradients = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
        for x in (loss.detach(), *gradients.values()):
            dist.all_reduce(x)
        return float(loss.detach()), gradients
    finally:
        parallel_state.destroy_model_parallel()
        forget_groups()


def gpt(model: Model) -> Any:
    """The model, from the backend's layers; weights from the seed."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nxdt_nemo.megatron.models.gpt.gpt_layer_specs import get_gpt_block_spec
    from nxdt_nemo.testing.recipe import Recipe, transformer_fields

    model_parallel_cuda_manual_seed(7)
    torch.manual_seed(3)
    llama = model.family == "llama"
    config = TransformerConfig(
        **transformer_fields(Recipe.of(model.family, layers=2)),
        activation_func=torch.nn.functional.silu if llama else torch.nn.functional.gelu,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        cp_comm_type=model.comm,
        recompute_granularity="selective" if model.recompute else None,
    )
    return GPTModel(
        config,
        get_gpt_block_spec(config),
        vocab_size=64,
        max_sequence_length=S,
        position_embedding_type="rope" if llama else "learned_absolute",
    )


def share(model: Model) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """This rank's tokens, cut by upstream's own function; the one for packed sequences is TransformerEngine's."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.utils import get_batch_on_this_cp_rank

    parts, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    text = torch.randint(64, (1 if model.packed else B, S + 1), generator=torch.Generator().manual_seed(4))
    batch = {"tokens": text[:, :-1], "labels": text[:, 1:], "positions": torch.arange(S).expand_as(text[:, 1:])}
    if model.packed:
        starts, longest = cumulated(LENGTHS), max(LENGTHS)
        batch = {key: x[:, places(Case(packed=LENGTHS), parts, rank)] for key, x in batch.items()}
        return batch, {"packed_seq_params": PackedSeqParams("thd", starts, starts, None, None, longest, longest)}
    if not model.zigzag:
        return {key: x.chunk(parts, 1)[rank] for key, x in batch.items()}, {}
    if model.mask:  # as Megatron-LM's data set makes it; a second document begins in the middle
        batch["attention_mask"] = torch.ones(B, 1, S, S, dtype=torch.bool).triu(1)
        batch["attention_mask"][:, :, S // 2 :, : S // 2] |= model.mask == "more"
    return get_batch_on_this_cp_rank({key: x.contiguous() for key, x in batch.items()}), {}


def model_errors(gloo: Gloo, model: Model) -> tuple[float, float]:
    """Loss and worst gradient of two ranks against one."""
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    one = replace(model, comm=None, zigzag=True, recompute=False, mask="")
    (expected, reference), *_ = gloo(1, trained, one, init=ACTIVE, env=ACTIVE_ENV)
    found = gloo(2, trained, model, init=ACTIVE, env=ACTIVE_ENV)
    loss, gradients = found[0]
    assert gradients.keys() == reference.keys() and len(reference) > 10
    worst = max(float((gradients[name] - x).abs().max() / x.abs().max()) for name, x in reference.items())
    return abs(loss - expected) / expected, worst


MODELS = {
    "p2p": Model(),
    "a2a": Model(comm="a2a"),
    "all_gather": Model(comm="all_gather"),
    "recompute": Model(recompute=True),
    "learned positions": Model("gpt"),
    "the loader's mask": Model(mask="causal"),
    "packed": Model(packed=True),
    "packed, a2a": Model(packed=True, comm="a2a"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_at_two_ranks_equals_one(gloo: Gloo, name: str) -> None:
    loss, gradient = model_errors(gloo, MODELS[name])
    assert loss <= 1e-6 and gradient <= 1e-6, (loss, gradient)


def test_a_model_whose_batch_is_not_in_megatrons_order_would_be_seen(gloo: Gloo) -> None:
    loss, gradient = model_errors(gloo, Model(zigzag=False))
    assert loss > 1e-5 and gradient > 1e-2


def refused(model: Model) -> str:
    from nxdt_nemo.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        trained(model)
    return str(caught.value)


@pytest.mark.parametrize("order", [("more",), ("causal", "more")])
def test_a_mask_that_hides_more_than_the_layer_is_refused(gloo: Gloo, order: tuple[str, ...]) -> None:
    """Also right after one that was found to be the layer's own."""
    for mask in order[:-1]:
        gloo(2, trained, Model(mask=mask), init=ACTIVE, env=ACTIVE_ENV)
    for line in gloo(2, refused, Model(mask="more"), init=ACTIVE, env=ACTIVE_ENV):
        assert line.startswith("attention_mask") and "context_parallel_size=2" in line
