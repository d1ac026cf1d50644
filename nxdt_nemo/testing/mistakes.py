"""Mistakes made on purpose, one for each kind of reduction: each must turn a parity table red.

Room testing/. Used by nxdt_nemo.testing.ours in an active rank; what a mistake changes is put back when it ends.
Proof: tests/megatron/test_parity.py, tests/megatron/test_layouts.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

__all__ = ["Fault", "Training", "mistake"]

Fault = Literal[
    "",
    "norm gradients not reduced",
    "one gradient x 1.01",
    "moments not resumed",
    "replicas not averaged",
    "experts not averaged",
    "tied embeddings not summed",
    "input gradients not summed",
    "norm of one rank",
    "KV copies not summed",
    "KV copies counted in the norm",
]
SCALED = "decoder.layers.1.mlp.linear_fc2.weight"


@dataclass(frozen=True)
class Training:
    """What a mistake can be made in: model chunks bare and in their gradient buffers, optimizer, named parameters."""

    model: list[Any]
    chunks: list[Any]
    optimizer: Any
    named: list[tuple[str, Any]]


def mistake(fault: Fault, training: Training) -> AbstractContextManager[None]:
    """Make this mistake while the context is open."""
    made = {
        "norm gradients not reduced": _norms,
        "one gradient x 1.01": _scaled,
        "replicas not averaged": _replicas,
        "experts not averaged": _experts,
        "tied embeddings not summed": _tied,
        "input gradients not summed": _inputs,
        "norm of one rank": _norm_alone,
        "KV copies not summed": _kv_copies,
        "KV copies counted in the norm": _kv_counted,
    }.get(fault)
    return made(training) if made is not None else nullcontext()


def _finalize() -> Any:
    # by name: the package's attribute of the same name is the function
    return importlib.import_module("megatron.core.distributed.finalize_model_grads")


def _nothing(*_: Any, **__: Any) -> None: ...


def _norms(_: Training) -> AbstractContextManager[Any]:
    """Gradients of what sequence-parallel ranks hold alike stay each rank's own."""
    return mock.patch.object(_finalize(), "_allreduce_non_tensor_model_parallel_grads", _nothing)


def _tied(_: Training) -> AbstractContextManager[Any]:
    """An embedding and its copy beside the last stage's output layer keep their own gradients."""
    return mock.patch.object(_finalize(), "_allreduce_embedding_grads", _nothing)


@contextmanager
def _scaled(training: Training) -> Iterator[None]:
    """One parameter's gradient is one per cent too large."""
    config = training.model[0].config
    plain = config.finalize_model_grads_func

    def scaled(*args: Any, **named: Any) -> None:
        plain(*args, **named)
        for name, parameter in training.named:
            if name == SCALED:
                parameter.main_grad.mul_(1.01)

    with mock.patch.object(config, "finalize_model_grads_func", scaled):
        yield


@contextmanager
def _unreduced(groups: Callable[[Any], list[Any]], training: Training) -> Iterator[None]:
    """These groups of buckets are scaled, as they are before a reduction, and not reduced."""
    for group in (group for chunk in training.chunks for group in groups(chunk)):
        group.finish_grad_sync = lambda group=group: [
            bucket.grad_data.mul_(bucket.gradient_scaling_factor) for bucket in group.buckets
        ]
    yield


def _replicas(training: Training) -> AbstractContextManager[None]:
    """Data and context parallel ranks keep their own gradients."""
    return _unreduced(lambda chunk: chunk.bucket_groups, training)


def _experts(training: Training) -> AbstractContextManager[None]:
    """Copies of an expert keep their own gradients."""
    return _unreduced(lambda chunk: chunk.expert_parallel_bucket_groups, training)


@contextmanager
def _inputs(training: Training) -> Iterator[None]:
    """A column-parallel layer's input gets its own rank's part of the gradient only."""
    from megatron.core.tensor_parallel import layers as module

    layers = [layer for one in training.model for layer in one.modules() if hasattr(layer, "allreduce_dgrad")]
    assert any(layer.allreduce_dgrad for layer in layers), "nothing to leave out in this layout"
    for layer in layers:
        layer.allreduce_dgrad = False  # then the layer leaves it to its input's own function
    with mock.patch.object(module, "copy_to_tensor_model_parallel_region", lambda x, group=None: x):
        yield


def _kv_copies(_: Training) -> AbstractContextManager[Any]:
    """Copies of a KV head keep their own gradients."""
    module = importlib.import_module("nxdt_nemo.megatron.distributed.finalize_model_grads")
    return mock.patch.object(module, "sum_kv_copies", _nothing)


@contextmanager
def _kv_counted(training: Training) -> Iterator[None]:
    """The norm takes every copy of a KV head for a head of its own."""
    for _, parameter in training.named:
        if hasattr(parameter, "kv_heads"):
            parameter.tensor_model_parallel = True
    yield


def _norm_alone(training: Training) -> AbstractContextManager[Any]:
    """The gradients' norm is each rank's own."""
    import torch.distributed as dist
    from megatron.core.optimizer import clip_grads, optimizer

    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)

    def norm(grads: Any, norm_type: float = 2, grad_stats_parallel_group: Any = None) -> float:
        return float(clip_grads.get_grad_norm_fp32(grads, norm_type, alone))

    return mock.patch.object(optimizer, "get_grad_norm_fp32", norm)
