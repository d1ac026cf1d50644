"""Our side of a parity table with all ranks in one process: see runtime/xla/lift.py.

Room testing/. Runs in a process of its own with lifted_env(layout) and init=ACTIVE.
Proof: tests/megatron/test_xla_lift.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nxdt_nemo.runtime import current
from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.testing.ours import forward_backward, set_up, update
from nxdt_nemo.testing.recipe import Batch, Layout, Recipe, micro_batches
from nxdt_nemo.testing.traced import TRACED_ENV
from nxdt_nemo.testing.weights import Ranks, piece, share

if TYPE_CHECKING:
    import torch

__all__ = ["Lifted", "lifted_env", "train"]


def lifted_env(layout: Layout) -> dict[str, str]:
    """The environment of the process, which torch_xla reads when it is imported."""
    return TRACED_ENV | {"CPU_NUM_DEVICES": str(layout.world), "XLA_USE_SPMD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


@dataclass
class Lifted:
    """losses and grad_norms of each step, by rank, and how many graphs each step compiled.

    within  of each step, what happened while it was traced that has no place in its one graph: readings, executions,
            operations off XLA, as runtime/xla/metrics.py counts them
    """

    losses: list[list[float]] = field(default_factory=list)
    grad_norms: list[list[float]] = field(default_factory=list)
    compiled: list[int] = field(default_factory=list)
    within: list[dict[str, int]] = field(default_factory=list)


def train(
    recipe: Recipe,
    weights: dict[str, torch.Tensor],
    layout: Layout,
    steps: int,
    ddp: Mapping[str, Any] | None = None,
) -> Lifted:
    """Some steps of all ranks. No pipelines, no experts, no context parallelism."""
    import torch
    from megatron.core import parallel_state

    from nxdt_nemo.runtime.xla.lift import Lift
    from nxdt_nemo.runtime.xla.metrics import counters, graphs_compiled, since
    from nxdt_nemo.runtime.xla.world import pretend

    lift, report = Lift(layout.world), Lifted()
    with pretend(current(), 0, layout.world, lift):  # type: ignore[arg-type]
        training = set_up(recipe, weights, layout, ddp)
        tp = _places(current().group_of(parallel_state.get_tensor_model_parallel_group()))
        dp = _places(current().group_of(parallel_state.get_data_parallel_group()))
        for name, parameter in training.named:
            parts = []
            for rank in range(layout.world):
                own = piece(name, parameter, parameter, recipe.gated, Ranks(tp=(tp[rank], layout.tp)))
                parts.append(share(weights[name], own.dim, own.gated, own.size, own.rank))
            lift.keep(parameter, parts)

        models = {id(parameter) for _, parameter in training.named}

        def state() -> Iterator[torch.Tensor]:
            yield from (parameter for _, parameter in training.named)
            yield from _optimizers(training.optimizer, models)

        def begin() -> list[torch.Tensor]:
            training.optimizer.reload_model_params()
            return []

        lift.step(state, [], begin)
        before = graphs_compiled()
        for step in range(steps):
            batches = [micro_batches(recipe, step)[dp[rank] :: layout.dp] for rank in range(layout.world)]
            inputs = [_stacked(lift, [mine[k] for mine in batches]) for k in range(len(batches[0]))]

            def run(*parts: torch.Tensor, step: int = step) -> list[torch.Tensor]:
                began = counters()
                for chunk in training.chunks:
                    chunk.zero_grad_buffer()
                training.optimizer.zero_grad()
                given = [Batch(tokens, labels) for tokens, labels in zip(parts[::2], parts[1::2], strict=True)]  # type: ignore[arg-type]
                losses = forward_backward(training.chunks, recipe, given, read=torch.Tensor.clone)
                norm = update(training.optimizer, recipe, step, read=torch.Tensor.detach)
                report.within.append(since(began))
                return [torch.stack(losses).mean(), norm]

            loss, norm = lift.step(state, [tensor for pair in inputs for tensor in pair], run)
            now = graphs_compiled()
            report.losses.append(loss.tolist())
            report.grad_norms.append(norm.tolist())
            report.compiled.append(now - before)
            before = now
    return report


def _places(group: Group) -> dict[int, int]:
    return {rank: place for ranks in group.mesh for place, rank in enumerate(ranks)}


def _stacked(lift: Any, batches: list[Batch]) -> list[torch.Tensor]:
    import torch

    return [lift.stack([torch.from_numpy(getattr(batch, name)) for batch in batches]) for name in ("tokens", "labels")]


def _optimizers(optimizer: Any, models: set[int]) -> Iterator[torch.Tensor]:
    """Main parameters that are none of the model's, and moments."""
    import torch

    mains = (one for group in optimizer.param_groups for one in group["params"])
    yield from (one for one in mains if id(one) not in models)
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in one.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
