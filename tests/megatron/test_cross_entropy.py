"""Our cross entropy against torch's in float64 and against megatron-core's own, on one rank and on two that divide
the vocabulary. Figures are errors / largest element."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, _model_parallel, forget_groups
from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.recipe import Layout, Recipe

pytestmark = pytest.mark.ranks

S, B, V = 9, 3, 50
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
OURS, UPSTREAM = "_CrossEntropyBackward", "_VocabParallelCrossEntropyBackward"  # whose node is in the graph
Found = dict[str, Any]
OnRanks = Callable[..., Found]


@pytest.fixture(scope="module")
def on_ranks(gloo: Gloo) -> Iterator[OnRanks]:
    """on_ranks(t, function, *args): what t tensor-parallel ranks report, the logits' gradient put together."""
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    entered: set[int] = set()

    def call(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        return gloo(ranks, function, *args, init=ACTIVE, env=ACTIVE_ENV)

    def run(ranks: int, function: Callable[..., Found], *args: Any) -> Found:
        if ranks not in entered:
            call(ranks, enter)
            entered.add(ranks)
        found = call(ranks, function, *args)
        gradient = torch.cat([one["gradient"] for one in found], -1)
        return found[0] | {"gradient": gradient, "losses": [one["loss"] for one in found]}

    yield run
    for ranks in entered:
        call(ranks, leave)


def enter() -> None:
    """All ranks of the pool are tensor-parallel."""
    import torch.distributed as dist

    _model_parallel(Recipe.of("gpt"), Layout(tp=dist.get_world_size()))


def leave() -> None:
    """The pool is the session's, and other tests use other layouts."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    forget_groups()


def group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def loss_of(way: str, logits: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    from megatron.core import tensor_parallel
    from megatron.core.fusions import fused_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import _VocabParallelCrossEntropy

    found: torch.Tensor
    if way == "plain":  # as LanguageModule calls it
        found = tensor_parallel.vocab_parallel_cross_entropy(logits, target, smoothing)
    elif way == "fused":  # with cross_entropy_loss_fusion
        found = fused_cross_entropy.fused_vocab_parallel_cross_entropy(logits, target, group())
    elif way == "upstream, fused":
        found = fused_cross_entropy._VocabParallelCrossEntropy.apply(logits, target, group())
    else:
        found = _VocabParallelCrossEntropy.apply(logits, target, smoothing)
    return found


def computed(
    way: str, logits: torch.Tensor, target: torch.Tensor, direction: torch.Tensor, smoothing: float = 0.0
) -> Found:
    """A rank's part: of the undivided logits [S, B, V] it is handed those of its own share of the vocabulary."""
    mine = group()
    leaf = logits.chunk(mine.size(), -1)[mine.rank()].clone().requires_grad_()
    loss = loss_of(way, leaf.clone(), target, smoothing)  # float32 logits are overwritten
    assert loss.grad_fn is not None
    [gradient] = torch.autograd.grad(loss, leaf, direction)
    return {"loss": loss.detach(), "gradient": gradient, "node": loss.grad_fn.name()}


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [S, B, V], targets at and around the border of two shards, the loss's gradient (not all the same)."""
    torch.manual_seed(7)
    logits, target, direction = 4 * torch.randn(S, B, V), torch.randint(0, V, (S, B)), torch.randn(S, B)
    target[0], target[1] = torch.tensor([0, V // 2 - 1, V // 2]), torch.tensor([V - 1, V // 2 + 1, 1])
    logits[2] += 1e4  # exp of these is infinite
    logits[3, :, : V // 2] -= 1e4  # the first rank's share of the sum is zero
    logits[4, :, V // 2 :] -= 1e4
    return logits.to(dtype), target, direction


def formula(logits: torch.Tensor, target: torch.Tensor, direction: torch.Tensor) -> Found:
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf.view(-1, V), target.view(-1), reduction="none").view(target.shape)
    [gradient] = torch.autograd.grad(loss, leaf, direction.double())
    return {"loss": loss.detach(), "gradient": gradient}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


GRADIENT = {  # 6e-8 measured in float32, in which it is computed, and the rounding to the logits' type
    F32: 2e-7,
    F64: 2e-7,
    BF16: 2**-8,
    F16: 2**-11,
}


@pytest.mark.parametrize("way", ["plain", "fused"])
@pytest.mark.parametrize("dtype", GRADIENT)
@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_and_gradient(on_ranks: OnRanks, ranks: int, dtype: torch.dtype, way: str) -> None:
    given = inputs(dtype)
    ours, theirs = on_ranks(ranks, computed, way, *given), on_ranks(ranks, computed, "upstream", *given)
    expected = formula(*given)
    assert (ours["node"], theirs["node"]) == (OURS, UPSTREAM)
    assert ours["loss"].dtype == F32 and ours["gradient"].dtype == dtype
    for mine, other in zip(ours["losses"], theirs["losses"], strict=True):
        assert torch.equal(mine, other)  # from the same operations on each element
        assert torch.equal(mine, ours["loss"])  # every rank has it
    # one by one: a target among logits that are 1e4 lower loses as much, and hides the others
    torch.testing.assert_close(ours["loss"].double(), expected["loss"], rtol=1e-6, atol=1e-6)
    assert error(ours["gradient"], expected["gradient"]) <= GRADIENT[dtype]
    assert error(ours["gradient"], theirs["gradient"]) <= 2 * GRADIENT[dtype]  # each has rounded


def test_two_ranks_give_what_one_gives(on_ranks: OnRanks) -> None:
    """Two partial sums instead of one: the last bit of a sum."""
    one, two = (on_ranks(ranks, computed, "plain", *inputs(F32)) for ranks in (1, 2))
    torch.testing.assert_close(two["loss"], one["loss"], rtol=2e-7, atol=2e-7)
    assert error(two["gradient"], one["gradient"]) <= 2e-7


@pytest.mark.parametrize("index", [0, V // 2 - 1, V // 2, V - 1])
def test_a_target_at_a_shards_border_counts_once(on_ranks: OnRanks, index: int) -> None:
    """With equal logits the gradient is 1 / V everywhere, less one at the target."""
    target = torch.full((S, B), index)
    found = on_ranks(2, computed, "plain", torch.zeros(S, B, V), target, torch.ones(S, B))
    torch.testing.assert_close(found["loss"], torch.full((S, B), float(V)).log())
    expected = torch.full((S, B, V), 1 / V) - F.one_hot(target, V)
    torch.testing.assert_close(found["gradient"], expected, rtol=1e-6, atol=0)


def test_the_gradient_of_float32_logits_is_not_rounded_to_bfloat16(on_ranks: OnRanks) -> None:
    """As upstream's fused one is: 2^-9 away, which the table's tolerance would not let pass."""
    given = inputs(F32)
    ours, theirs = (on_ranks(1, computed, way, *given)["gradient"] for way in ("fused", "upstream, fused"))
    assert torch.equal(theirs, theirs.bfloat16().float())
    assert not torch.equal(ours, ours.bfloat16().float())
    assert error(theirs, formula(*given)["gradient"]) > 1e-3 > 1e3 * GRADIENT[F32]


def test_another_target_would_be_seen(on_ranks: OnRanks) -> None:
    logits, target, direction = inputs(F32)
    found = on_ranks(2, computed, "plain", logits, target, direction)
    target[5, 1] = (target[5, 1] + 1) % V
    expected = formula(logits, target, direction)
    assert int(((found["loss"] - expected["loss"]).abs() > 1e-4).sum()) == 1
    assert error(found["gradient"], expected["gradient"]) > 1e-2


@pytest.mark.parametrize("ranks", [1, 2])
def test_label_smoothing_is_upstreams(on_ranks: OnRanks, ranks: int) -> None:
    """With two ranks too, where each has a loss of its own, of its share of the vocabulary: upstream's mistake."""
    _, target, direction = inputs(F32)
    given = torch.randn(S, B, V), target, direction
    ours, theirs = (on_ranks(ranks, computed, way, *given, 0.1) for way in ("plain", "upstream"))
    assert ours["node"] == theirs["node"] == UPSTREAM
    assert torch.equal(ours["gradient"], theirs["gradient"])
    assert all(torch.equal(mine, other) for mine, other in zip(ours["losses"], theirs["losses"], strict=True))
    assert torch.equal(theirs["losses"][0], theirs["losses"][-1]) is (ranks == 1)
    plain = on_ranks(ranks, computed, "plain", *given)
    assert error(ours["gradient"], plain["gradient"]) > 1e-2


def test_a_transposed_target(on_ranks: OnRanks) -> None:
    logits, target, direction = inputs(F32)
    turned = on_ranks(1, computed, "plain", logits, target.t().contiguous().t(), direction)
    straight = on_ranks(1, computed, "plain", logits, target, direction)
    assert torch.equal(turned["loss"], straight["loss"]) and torch.equal(turned["gradient"], straight["gradient"])


def without_writes(traced: bool, *args: Any) -> Found:
    """As a device takes it, one that traces or not; what the backward pass runs, too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from nxdt_nemo.megatron.tensor_parallel import cross_entropy

    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with (
        mock.patch.object(cross_entropy, "_BLOCKED_DEVICES", frozenset()),
        mock.patch.object(cross_entropy, "TRACED_DEVICES", frozenset({"cpu"} if traced else ())),
        Names(),
    ):
        return computed("plain", *args) | {"operations": seen}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("traced", [False, True])
def test_a_mask_in_place_of_a_write_at_an_index(on_ranks: OnRanks, ranks: int, traced: bool) -> None:
    given = inputs(F32)
    found, usual = on_ranks(ranks, without_writes, traced, *given), on_ranks(ranks, computed, "plain", *given)
    assert torch.equal(found["loss"], usual["loss"]) and torch.equal(found["gradient"], usual["gradient"])
    assert not [name for name in found["operations"] if "scatter" in name or "index_put" in name]


def test_a_mask_of_a_large_vocabulary() -> None:
    from nxdt_nemo.megatron.tensor_parallel.cross_entropy import _at

    index, amount = torch.tensor([[0], [255], [256], [599]]), torch.arange(1.0, 5.0).unsqueeze(1)
    expected = torch.zeros(4, 600).scatter_(1, index, amount)
    assert torch.equal(_at(index, torch.zeros(4, 600), amount), expected)


# --- blocks, memory, collectives ---------------------------------------------------------------------------------


def in_blocks(elements: int, *args: Any) -> Found:
    """With _BLOCK = elements; how many rows each block had."""
    from nxdt_nemo.megatron.tensor_parallel import cross_entropy

    before, cross_entropy._BLOCK = cross_entropy._BLOCK, elements
    try:
        [shard, *_] = args[0].chunk(group().size(), -1)
        blocks = cross_entropy._blocks(shard.reshape(-1, shard.shape[-1]), torch.arange(S * B))
        return computed("plain", *args) | {"blocks": [numbers.tolist() for _, numbers in blocks]}
    finally:
        cross_entropy._BLOCK = before


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rows", [0.1, 1, 4.5, S * B - 1, S * B, 100])
def test_blocks_do_not_show(on_ranks: OnRanks, rows: float, ranks: int) -> None:
    """A row is summed by itself, whatever stands beside it; another order of summing would be 2e-7 at most."""
    given = inputs(F32)
    found, whole = on_ranks(ranks, in_blocks, int(rows * V / ranks), *given), on_ranks(ranks, computed, "plain", *given)
    assert [number for block in found["blocks"] for number in block] == list(range(S * B))
    assert max(map(len, found["blocks"])) == min(max(int(rows), 1), S * B)
    torch.testing.assert_close(found["loss"], whole["loss"], rtol=2e-7, atol=2e-7)
    assert error(found["gradient"], whole["gradient"]) <= 2e-7


def stored(logits: torch.Tensor, target: torch.Tensor, direction: torch.Tensor) -> Found:
    """Saved tensors as large as the logits, what became of the logits, and where the gradient lies."""
    from nxdt_nemo.megatron.tensor_parallel.cross_entropy import _CrossEntropy

    leaf = logits.requires_grad_()
    given = leaf.clone()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of("plain", given, target, 0.0)
    large = [tensor for tensor in saved if tensor.numel() == logits.numel()]
    gradient, *_ = _CrossEntropy.backward(loss.grad_fn, direction)  # before autograd converts anything
    return {
        "loss": loss.detach(),
        "gradient": gradient,
        "large": [tensor.dtype for tensor in large],
        "the logits' memory": large[0].data_ptr() == given.data_ptr(),
        "the logits as before": torch.equal(given, leaf),
        "the saved tensor is the gradient": gradient.data_ptr() == large[0].data_ptr(),
    }


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_float32_tensor_of_the_logits_size_is_saved(on_ranks: OnRanks, dtype: torch.dtype) -> None:
    found, wide = on_ranks(1, stored, *inputs(dtype)), dtype == F32
    assert found["large"] == [F32]
    assert found["the logits' memory"] is wide
    assert found["the logits as before"] is not wide
    assert found["the saved tensor is the gradient"] is wide
    assert found["gradient"].dtype == dtype


def counted(*args: Any) -> Found:
    """The numbers of elements that are all-reduced."""
    import torch.distributed as dist

    sizes: list[int] = []
    real = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
        sizes.append(tensor.numel())
        return real(tensor, *rest, **named)

    dist.all_reduce = all_reduce
    try:
        return computed("plain", *args) | {"sizes": sizes}
    finally:
        dist.all_reduce = real


@pytest.mark.parametrize("ranks, expected", [(1, []), (2, [S * B] * 3)])
def test_three_numbers_a_token_are_all_reduced(on_ranks: OnRanks, ranks: int, expected: list[int]) -> None:
    assert on_ranks(ranks, counted, *inputs(F32))["sizes"] == expected
