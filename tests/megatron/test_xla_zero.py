"""ZeRO-1 where steps are traced: one graph on all ranks, the cpu lane's numbers, one format of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nxdt_nemo.testing.matrix import recipe_of
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, assemble
from nxdt_nemo.testing.parity import NO_CLIPPING, Parity, relative
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.recipe import Layout, Recipe, layout
from nxdt_nemo.testing.reference import Trained
from nxdt_nemo.testing.script_run import read_tensors
from nxdt_nemo.testing.traced import TRACED_ENV, Traced

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("with_torch_xla")]
STEPS = 4
INSTANCES = {"num_distributed_optimizer_instances": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 30_000}
TRAIN = "nxdt_nemo.testing.traced:train"


def pool_of(world: int) -> RankPool:
    """Ranks on the lane. A process has one lane: these are not the session's."""
    return RankPool(world, env=TRACED_ENV, init=ACTIVE, group=False, timeout=600)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def losses(parts: list[Traced]) -> list[float]:
    """The mean of the ranks' own micro-batches, of those that have losses."""
    return [sum(step) / len(step) for step in zip(*(part.losses for part in parts if part.losses), strict=True)]


# --- one graph, the same on all ranks ----------------------------------------------------------------------


@contextmanager
def no_transport(shard_by_rank: bool) -> Iterator[None]:
    """Collectives of the right shapes that go nowhere, so that a graph is not cut; none knows its rank, or one does."""
    from nxdt_nemo.runtime import current

    def shard(x: Any, dim: int, group: Any) -> Any:
        parts = x.chunk(group.size)
        return parts[group.rank if shard_by_rank else 0] * 1.0

    stand_ins = {
        "all_reduce_": lambda x, group, op="sum": x.mul_(group.size),
        "reduce_scatter": lambda x, dim, group: x.view(group.size, -1).sum(0),
        "all_gather": lambda x, dim, group: x.repeat(group.size),
        "shard": shard,
    }
    with mock.patch.multiple(current().ops, **stand_ins):
        yield


def graphs_of(cases: list[tuple[Recipe, Layout]], mistake: str) -> list[str]:
    """The graph of an optimizer's step on this rank, as HLO text, for each recipe and layout. Nothing is compiled."""
    import torch_xla
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    from nxdt_nemo.testing.ours import forget_groups, set_up, update
    from nxdt_nemo.testing.pool import lane_here

    def as_upstream(self: Any) -> list[Any]:
        from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

        return [p.grad for p in self.get_parameters() if param_is_not_tensor_parallel_duplicate(p)]

    lane = lane_here()
    found = []
    norm = as_upstream if mistake == "norm by rank" else MegatronOptimizer.get_main_grads_for_grad_norm
    with (
        no_transport(mistake == "shard by rank"),
        mock.patch.object(MegatronOptimizer, "get_main_grads_for_grad_norm", norm),
    ):
        for recipe, place in cases:
            training = set_up(recipe, None, place)
            params = [param for chunk in training.model for param in chunk.parameters()]
            for param in params:
                param.main_grad.copy_(torch.full(param.shape, 0.1))
            lane.synchronize()
            states = [state for one in training.optimizer.chained_optimizers for state in one.state.values()]
            outputs = [update(training.optimizer, recipe, 0, read=lambda found: found), *params]
            outputs += [tensor for state in states for tensor in state.values()]
            found.append(torch_xla._XLAC._get_xla_tensors_hlo(outputs))
            forget_groups()
    return found


def one_kv_head(name: str, dtype: str = "float32") -> tuple[Recipe, Layout]:
    """A Llama whose tensor-parallel ranks have copies of one KV head."""
    return Recipe.of("llama", layers=1, kv_groups=1, dtype=dtype), layout(name)


TWO = [one_kv_head("dp2+zero"), one_kv_head("tp2")]
FOUR = [
    one_kv_head("tp4", "bfloat16"),
    one_kv_head("tp2dp2+zero", "bfloat16"),
    one_kv_head("tp4+zero"),
    recipe_of("mixtral", "ep2dp4+zero"),
]


@pytest.mark.parametrize(("world", "cases"), [(2, TWO), slow(4, FOUR)])
def test_all_ranks_have_one_graph(world: int, cases: list[tuple[Recipe, Layout]]) -> None:
    """To the byte; a slice at a rank's place and a filter by rank show. Sharded and unsharded."""
    with pool_of(world) as pool:
        for graphs in zip(*pool.run(graphs_of, cases, ""), strict=True):
            assert len(set(graphs)) == 1
        for mistake, case in (("shard by rank", cases[0]), ("norm by rank", TWO[-1])) if world == 2 else ():
            assert len({graph for [graph] in pool.run(graphs_of, [case], mistake)}) == 2, mistake


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("gpt", "float32"), ("gpt", "bfloat16"), ("llama", "float32"), ("mixtral", "float32")],
)
def test_a_step_is_one_graph_and_equals_the_cpu_lanes(parity: Parity, family: Any, dtype: Any) -> None:
    """Moments and main parameters are there before the first step: of a GPT it has the graph of all others."""
    recipe = Recipe.of(family, layers=2, dtype=dtype)
    with pool_of(1) as pool:
        [found] = pool.run(TRAIN, recipe, parity.weights(recipe), layout("one+zero"), STEPS)
    expected, _ = parity.ours(recipe, layout("one+zero"))
    half = dtype == "bfloat16"
    assert relative(found.losses, expected.losses[:STEPS]) <= (1e-3 if half else 1e-6)
    assert relative(found.grad_norms, expected.grad_norms[:STEPS]) <= (1e-2 if half else 1e-6)
    # The second graph is that of rotary embeddings, which the first step computes and keeps.
    graphs = 1 if family == "gpt" else 2
    assert found.steps == [{"compiled": 1, "executed": 1}] * graphs + [{"executed": 1}] * (STEPS - graphs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "fault"),
    [
        ("gpt", "dp2+zero", ""),
        ("gpt", "dp2+zero", "one gradient x 1.01"),
        ("llama", "tp2dp2+zero", ""),
        ("gpt", "tp2spdp2+zero", ""),
    ],
)
def test_processes_equal_the_cpu_lanes_ranks(parity: Parity, family: Any, name: str, fault: Any) -> None:
    """Each rank traces on its own XLA:CPU, and its graph is cut where ranks talk. A Llama's KV head has copies."""
    recipe, place = Recipe.of(family, layers=2, **({"kv_groups": 1} if family == "llama" else {})), layout(name)
    with pool_of(place.world) as pool:
        parts = pool.run(TRAIN, recipe, parity.weights(recipe), place, range(STEPS), fault)
    expected, _ = parity.ours(recipe, place)
    errors = [relative(losses(parts), expected.losses[:STEPS])]
    errors += [relative(part.grad_norms, expected.grad_norms[:STEPS]) for part in parts]
    assert (max(errors) <= 1e-6) == (not fault), errors


# --- the same buckets on the cpu lane, without a compiler ---------------------------------------------------


def train_as_if_traced(*arguments: Any) -> Any:
    """ours.train with what a lane that traces has in place of flat buffers."""
    from megatron.core.distributed import distributed_data_parallel, param_and_grad_buffer

    from nxdt_nemo.megatron.distributed import param_and_grad_buffer as mine
    from nxdt_nemo.runtime import current
    from nxdt_nemo.testing import ours

    with (
        mock.patch.object(type(current()), "traced", True),
        mock.patch.object(distributed_data_parallel, "_ParamAndGradBuffer", mine._ParamAndGradBuffer),
        mock.patch.object(param_and_grad_buffer, "_ParamAndGradBucketGroup", mine._ParamAndGradBucketGroup),
        mock.patch.object(ours, "gather_gradients"),
    ):
        return ours.train(*arguments)


BUCKETS = [
    ("dp2+zero", "float32", {}),
    ("dp4+zero", "float32", INSTANCES),
    ("tp2dp2+zero", "bfloat16", OVERLAP),
]


@dataclass(frozen=True)
class AsIfTraced:
    """Parity.leg, with train_as_if_traced in place of ours.train."""

    parity: Parity
    gloo: Any

    def leg(
        self,
        recipe: Recipe,
        place: Layout,
        steps: range,
        *,
        resume: Path | None = None,
        save: Path | None = None,
        **ddp: Any,
    ) -> Trained:
        arguments = (recipe, self.parity.weights(recipe), place, "", steps, resume, save, ddp)
        return assemble(self.gloo(place.world, train_as_if_traced, *arguments, init=ACTIVE, env=ACTIVE_ENV))[0]


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [key for key in right if not torch.equal(left[key], right[key])]


def small(dtype: Any) -> Recipe:
    return Recipe.of("llama", layers=1, steps=4, dtype=dtype, clip=NO_CLIPPING)


@pytest.mark.parametrize(("name", "dtype", "ddp"), [("dp2+zero", "bfloat16", {}), *(slow(*case) for case in BUCKETS)])
def test_buckets_hold_what_flat_buffers_hold(
    parity: Parity, gloo: Any, name: str, dtype: Any, ddp: dict[str, Any]
) -> None:
    """Weights to the bit, without clipping; the norm is a sum in another order."""
    recipe, place = small(dtype), layout(name)
    expected = parity.leg(recipe, place, range(4), **ddp)
    found = AsIfTraced(parity, gloo).leg(recipe, place, range(4), **ddp)
    assert found.losses == expected.losses and differing(found.weights, expected.weights) == []
    assert relative(found.grad_norms, expected.grad_norms) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "ddp"), [("dp2+zero", "bfloat16", {}), *BUCKETS])
def test_buckets_and_flat_buffers_read_each_others_checkpoints(
    parity: Parity, gloo: Any, tmp_path: Path, name: str, dtype: Any, ddp: dict[str, Any]
) -> None:
    """Which are equal to the bit, and what goes on from them."""
    recipe, place, traced = small(dtype), layout(name), AsIfTraced(parity, gloo)
    expected = parity.leg(recipe, place, range(4), **ddp)
    parity.leg(recipe, place, range(2), save=tmp_path / "flat", **ddp)
    traced.leg(recipe, place, range(2), save=tmp_path / "traced", **ddp)
    assert differing(read_tensors(tmp_path / "traced"), read_tensors(tmp_path / "flat")) == []
    rest = traced.leg(recipe, place, range(2, 4), resume=tmp_path / "flat", **ddp)
    back = parity.leg(recipe, place, range(2, 4), resume=tmp_path / "traced", **ddp)
    for found in (rest, back):
        assert found.losses == expected.losses[2:] and differing(found.weights, expected.weights) == []


# --- checkpoints between the lanes -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("home", "other", "dtype"),
    [("one+zero", "dp2+zero", "float32"), ("dp2+zero", "tp2", "float32"), ("dp2+zero", "one+zero", "bfloat16")],
)
def test_saved_on_one_lane_and_resumed_on_the_other(
    parity: Parity, tmp_path: Path, home: str, other: str, dtype: Any
) -> None:
    """home on the xla lane, other on the cpu lane. What is read and written again is equal to the bit."""
    recipe, place, there = Recipe.of("gpt", layers=2, steps=6, dtype=dtype), layout(home), layout(other)
    weights, limit = parity.weights(recipe), 1e-3 if dtype == "bfloat16" else 1e-6
    whole = parity.leg(recipe, there, range(6))
    parity.leg(recipe, there, range(3), save=tmp_path / "cpu")
    with pool_of(place.world) as pool:
        pool.run(TRAIN, recipe, weights, place, range(3), "", None, tmp_path / "xla")
        rest = pool.run(TRAIN, recipe, weights, place, range(3, 6), "", tmp_path / "cpu")
        pool.run(TRAIN, recipe, weights, place, range(0), "", tmp_path / "cpu", tmp_path / "again")
    back = parity.leg(recipe, there, range(3, 6), resume=tmp_path / "xla")
    for found in (losses(rest), back.losses):
        assert relative(found, whole.losses[3:]) <= limit
    again, first, mine = (read_tensors(tmp_path / folder) for folder in ("again", "cpu", "xla"))
    assert differing(again, first) == [] and mine.keys() == first.keys()
