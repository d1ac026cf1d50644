"""ZeRO-1 on the xla lane: one graph a step and the same on all ranks, the cpu lane's numbers, one format of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nxdt_nemo.testing.matrix import recipe_of
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.parity import Parity, relative
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.recipe import Layout, Recipe, layout
from nxdt_nemo.testing.script_run import read_tensors
from nxdt_nemo.testing.traced import TRACED_ENV, Traced

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("with_torch_xla")]
STEPS = 4
TRAIN = "nxdt_nemo.testing.traced:train"


def traced(world: int) -> RankPool:
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
    import os

    import torch_xla
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    from nxdt_nemo.runtime import current
    from nxdt_nemo.testing.ours import forget_groups, set_up, update

    def as_upstream(self: Any) -> list[Any]:
        from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

        return [p.grad for p in self.get_parameters() if param_is_not_tensor_parallel_duplicate(p)]

    lane = current()
    lane.init_ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
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
            [optimizer] = training.optimizer.chained_optimizers
            outputs = [update(training.optimizer, recipe, 0, read=lambda found: found), *params]
            outputs += [tensor for state in optimizer.state.values() for tensor in state.values()]
            found.append(torch_xla._XLAC._get_xla_tensors_hlo(outputs))
            forget_groups()
    return found


def one_kv_head(name: str, dtype: str = "float32") -> tuple[Recipe, Layout]:
    """A Llama whose tensor-parallel ranks have copies of one KV head."""
    return Recipe.of("llama", layers=1, kv_groups=1, dtype=dtype), layout(name)


TWO = [one_kv_head("dp2+zero"), one_kv_head("tp2+zero", "bfloat16"), one_kv_head("tp2", "bfloat16"), one_kv_head("tp2")]
FOUR = [one_kv_head("tp2dp2+zero", "bfloat16"), one_kv_head("tp4+zero"), recipe_of("mixtral", "ep2dp4+zero")]


@pytest.mark.parametrize(("world", "cases"), [(2, TWO), slow(4, FOUR)])
def test_all_ranks_have_one_graph(world: int, cases: list[tuple[Recipe, Layout]]) -> None:
    """To the byte; a slice at a rank's place and a filter by rank show. Sharded and unsharded."""
    with traced(world) as pool:
        for graphs in zip(*pool.run(graphs_of, cases, ""), strict=True):
            assert len(set(graphs)) == 1
        for mistake, case in (("shard by rank", cases[0]), ("norm by rank", TWO[-1])) if world == 2 else ():
            assert len({graph for [graph] in pool.run(graphs_of, [case], mistake)}) == 2, mistake
