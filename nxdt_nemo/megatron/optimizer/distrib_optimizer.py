"""megatron-core's distributed optimizer, over its own gradient and parameter buffers.

Room megatron/. Stands in for megatron.core.optimizer.distrib_optimizer.DistributedOptimizer: same constructor and
interface. Upstream's tells parameters apart by CUDA type strings, and saves its state by place in a buffer, or
flattened; ours by name in the parameter's shape (docs/checkpoints.md). Reduce-scatter and all-gather are those of
megatron-core's DistributedDataParallel; where steps are traced, those of traced_zero.py's buckets.
Proof: tests/megatron/test_zero.py, test_xla_zero.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer, param_group_identifier_keys
from torch import Tensor, nn

from nxdt_nemo.errors import NotOnNeuron
from nxdt_nemo.megatron.optimizer.sharded_state import (
    Loaded,
    Tensors,
    common_rate,
    load_pieces,
    state_template,
    whole_states,
)
from nxdt_nemo.megatron.optimizer.traced_zero import TracedBucket, alike, on_host, to_device
from nxdt_nemo.megatron.optimizer.zero import Bucket, Part, Piece
from nxdt_nemo.runtime.select import current

__all__ = ["DistributedOptimizer"]

EXPERT = ("is_expert_parallel", "pre_is_expert_parallel")
"""A group's mark that it is of experts in expert parallelism: a matter of this run, not of the checkpoint."""


class DistributedOptimizer(MixedPrecisionOptimizer):
    """Steps `optimizer` (Adam) on this rank's pieces of the parameters.

    optimizer           built on the model's parameters; its groups are rewritten to the pieces' main parameters
    per_model_buffers   {model chunk: its buffers}, of DistributedDataParallel(use_distributed_optimizer=True)
    data_parallel_group_gloo   for checkpoints; None: the buffers' own group, where that is gloo
    Memory a rank, P parameters on d ranks: 8 P / d bytes of float32 state, and 4 P / d of main parameters where the
    model's are bf16 or steps are traced. Raises NotOnNeuron for what needs CUDA kernels.
    """

    def __init__(
        self,
        optimizer: Any,
        config: Any,
        grad_scaler: Any,
        init_state_fn: Any,
        model_chunks: list[Any],
        per_model_buffers: dict[int, list[Any]],
        data_parallel_group: Any,
        data_parallel_group_gloo: Any,
        data_parallel_group_idx: int,
        distributed_optimizer_instance_id: int,
    ) -> None:
        super().__init__(optimizer, config, grad_scaler, init_state_fn)
        self.model_chunks, self.ddp_config = model_chunks, model_chunks[0].ddp_config
        self.data_parallel_group, self.data_parallel_group_gloo = data_parallel_group, data_parallel_group_gloo
        self.data_parallel_group_idx = data_parallel_group_idx
        self.distributed_optimizer_instance_id = distributed_optimizer_instance_id
        self.is_stub_optimizer = optimizer is None
        self.buffers = [] if optimizer is None else [x for found in per_model_buffers.values() for x in found]
        self.buckets: list[Bucket | TracedBucket] = []
        self._steps = 0
        if optimizer is not None:
            _refuse(optimizer, config, self.ddp_config)
            divided = self._traced_buckets if current().traced else self._eager_buckets
            self.buckets += divided()
            self._adopt()

    def _eager_buckets(self) -> Iterator[Bucket]:
        """megatron-core's."""
        for param in (param for group in self.optimizer.param_groups for param in group["params"]):
            if param.requires_grad and param.dtype != torch.float32:  # upstream's mark
                param.main_param, param.main_param_sharded = None, True
        for buffer in self.buffers:
            yield from (_bucket(bucket, buffer) for bucket in buffer.buckets)

    def _traced_buckets(self) -> Iterator[TracedBucket]:
        """megatron-core's, each divided into what is stepped and counted alike."""
        place = {param: number for number, group in enumerate(self.optimizer.param_groups) for param in group["params"]}
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                instances = self._instances(bucket)
                ranks = buffer.data_parallel_group.size() * (1 if instances is None else instances.size())
                scale = bucket.gradient_scaling_factor / (ranks if self.ddp_config.average_in_collective else 1)
                for params in alike(bucket.params_list, place.__getitem__):
                    yield TracedBucket.of(params, buffer.data_parallel_group, scale, buffer.grad_dtype, instances)

    def _instances(self, bucket: Any) -> dist.ProcessGroup | None:
        """The ranks that hold the state of a bucket's ranks too, num_distributed_optimizer_instances in all."""
        groups = (group for chunk in self.model_chunks for group in _bucket_groups(chunk))
        mine = next(group for group in groups if bucket in group.buckets)
        return getattr(mine, "inter_distributed_optimizer_instance_group", None)

    def _adopt(self) -> None:
        """Put the main parameters of this rank's part in the place of the model's."""
        self.model_params: list[nn.Parameter] = []
        self._pieces: list[Piece | TracedBucket] = []
        pieces = {param: piece for bucket in self.buckets for param, piece in bucket.pieces.items()}
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            params = [param for param in group["params"] if param.requires_grad]
            mine = list(dict.fromkeys(pieces[param] for param in params if param in pieces))
            for piece in mine:
                piece.begin(self.optimizer.state)
                if isinstance(piece, Piece) and piece.main is not piece.model:
                    piece.param.main_param = piece.main  # type: ignore[attr-defined]
            group["params"] = [piece.main for piece in mine]
            self.model_params += params
            self._pieces += mine

    def get_grad_stats_parallel_group(self) -> Any:
        """All ranks that hold pieces: norms are sums over them."""
        return self.grad_stats_parallel_group

    # --- step ----------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients outside the buffers, which DistributedDataParallel.zero_grad_buffer clears."""
        for param in [] if self.is_stub_optimizer else self.model_params:
            param.grad = None
        for piece in [] if self.is_stub_optimizer else self._pieces:
            piece.drop()

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Step this rank's pieces, and gather what the others have stepped, unless the forward pass does that."""
        done = bool(super().step_with_ready_grads())
        if not self.is_stub_optimizer:
            self._count(self._steps + 1)
        if not self.ddp_config.overlap_param_gather:
            self._gather()
        return done

    def _gather(self) -> None:
        """Give each rank what the others have stepped, of this optimizer's own buckets.

        A chunk's start_param_sync gathers all it has: a model with experts has two optimizers, and would send twice.
        """
        mine = {bucket for buffer in self.buffers for bucket in buffer.buckets}
        for chunk in self.model_chunks:
            for group in _bucket_groups(chunk):
                if not mine.isdisjoint(group.buckets):
                    group.start_param_sync()

    def _count(self, steps: int) -> None:
        """The number of steps made, in each group: the inner optimizer does not count one without pieces here."""
        self._steps = steps
        for group in self.optimizer.param_groups:
            group["step"] = steps

    def counted_gradients(self) -> list[Tensor]:
        """This rank's pieces of the gradients that count in a norm, scaled to what they count."""
        pieces = [] if self.is_stub_optimizer else self._pieces
        return [grad for piece in pieces for grad in piece.counted()]

    def get_main_grads_for_grad_norm(self) -> list[Tensor]:
        """As counted_gradients, after _copy_model_grads_to_main_grads."""
        return self.counted_gradients()

    def _collect_main_grad_data_for_unscaling(self) -> list[Tensor]:
        return [piece.main.grad for piece in self._pieces if piece.main.grad is not None]

    def _copy_model_grads_to_main_grads(self) -> None:
        for piece in self._pieces:
            piece.collect()

    def _copy_main_params_to_model_params(self) -> None:
        for piece in self._pieces:
            piece.publish(self._steps + 1)

    def _copy_model_params_to_main_params(self) -> None:
        for piece in self._pieces:
            piece.refresh()

    # --- state ---------------------------------------------------------------------------------------

    def _state_of(self, part: Part) -> Tensors:
        return part.state(self.optimizer.state)

    def state_dict(self) -> dict[str, Any]:
        """What is the same on each data-parallel rank: hyper-parameters, steps, loss scale. No tensors of pieces."""
        return {} if self.is_stub_optimizer else self._wrapped({"param_groups": self._groups()})

    def _hosts(self) -> dict[dist.ProcessGroup, dist.ProcessGroup]:
        """A group for tensors of the host for each bucket's."""
        return {bucket.group: self.data_parallel_group_gloo or bucket.group for bucket in self.buckets}

    def _groups(self) -> list[dict[str, Any]]:
        """Without parameters; a group that has not been stepped yet says so."""
        groups = ({"step": 0, **group} for group in self.optimizer.param_groups)
        return [{name: value for name, value in group.items() if name != "params"} for group in groups]

    def _wrapped(self, inner: dict[str, Any]) -> dict[str, Any]:
        """In megatron-core's places: those of FP32Optimizer, or of the one with float32 main parameters."""
        if all(param.dtype == torch.float32 for param in self.model_params):
            return inner
        scaler = {"grad_scaler": self.grad_scaler.state_dict()} if self.grad_scaler else {}
        return {"optimizer": inner, **scaler}

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        sharding_type: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """state_dict(), and under `state` the pieces' tensors by name (docs/checkpoints.md).

        sharding_type, metadata   upstream's formats; ours is one for all
        """
        if not is_loading and self.ddp_config.overlap_param_gather:
            for chunk in self.model_chunks:  # the model's own are saved too, and else wait for the next forward pass
                chunk.start_param_sync(force_sync=True)
        if self.is_stub_optimizer:
            return {}
        buckets = on_host(self.buckets, self.optimizer.state, read=not is_loading)
        held = buckets, self.model_params, self._state_of, model_sharded_state_dict
        if is_loading:
            state = state_template(*held, self.distributed_optimizer_instance_id)
            groups: list[dict[str, Any]] = [{} for _ in self.optimizer.param_groups]
        else:
            state = whole_states(*held, self._hosts(), self.distributed_optimizer_instance_id)
            groups = self._groups()
        return self._wrapped({"state": state, "param_groups": groups})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what sharded_state_dict() gave, after it was loaded. All data-parallel ranks call it."""
        if self.is_stub_optimizer:
            return
        loaded = Loaded.of(state_dict)
        self._take_groups(loaded)
        self._count(loaded.steps)
        buckets = on_host(self.buckets, self.optimizer.state, read=False)
        to_device(load_pieces(buckets, self.model_params, self._state_of, loaded, self._hosts()))
        if self.grad_scaler and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _take_groups(self, loaded: Loaded) -> None:
        """Hyper-parameters of the saved group of the same kind, in any order; of an expert's, of the others' like it.

        Where there is none, an optimizer that groups its parameters in another way saved them: the learning rate.
        """
        known = {_kind(group, apart): group for apart in (False, True) for group in loaded.groups}
        mine = self.optimizer.param_groups
        found = [known.get(_kind(group, True), known.get(_kind(group, False))) for group in mine]
        if None in found:
            loaded.for_groups(len(mine))
        for group, saved in zip(mine, found, strict=True):
            values = common_rate(loaded.groups) if saved is None else saved
            group.update({name: value for name, value in values.items() if name not in ("params", *EXPERT)})

    def save_parameter_state(self, filename: str) -> None:
        """Upstream's file of one data-parallel rank's making. Raises NotOnNeuron."""
        raise NotOnNeuron(f"{filename}: optimizer state is not kept in a file of its own; use ckpt_format torch_dist")

    def load_parameter_state(self, filename: str, *, update_legacy_format: bool = False) -> None:
        """As save_parameter_state."""
        raise NotOnNeuron(f"{filename}: optimizer state is not kept in a file of its own; use ckpt_format torch_dist")


def _kind(group: dict[str, Any], experts_apart: bool) -> tuple[Any, ...]:
    """What makes megatron-core put parameters into one group. NeMo renames a scheduler's keys to pre_*."""
    keys = [key for key in param_group_identifier_keys if experts_apart or key not in EXPERT]
    return (experts_apart, *(group.get(key, group.get(f"pre_{key}")) for key in keys))


def _bucket_groups(chunk: Any) -> list[Any]:
    """Of a DistributedDataParallel."""
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def _bucket(bucket: Any, buffer: Any) -> Bucket:
    """megatron-core's bucket as ours."""
    spans = []
    for param in bucket.params_list:
        first, last, _ = buffer.param_index_map[param]
        spans.append((param, first - bucket.offset, last - bucket.offset))
    return Bucket(spans, buffer.data_parallel_group, bucket.param_data, bucket.grad_data)


def _refuse(optimizer: Any, config: Any, ddp_config: Any) -> None:
    """Raise NotOnNeuron for settings that this optimizer does not have."""
    for key, found in (
        ("use_custom_fsdp", ddp_config.use_custom_fsdp),
        ("optimizer_cpu_offload", config.optimizer_cpu_offload),
        ("use_precision_aware_optimizer", config.use_precision_aware_optimizer),
    ):
        if found:
            raise NotOnNeuron(f"{key}=True with the distributed optimizer; use {key}=False")
    if config.log_num_zeros_in_grad and current().traced:
        raise NotOnNeuron("log_num_zeros_in_grad=True where steps are traced: it reads a number in each; use False")
    if config.optimizer != "adam":
        raise NotOnNeuron(f"optimizer={config.optimizer!r} with the distributed optimizer; use optimizer='adam'")
