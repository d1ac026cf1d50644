"""The fused query, key and value projection where KV heads have copies.

Room megatron/. Subclass of megatron.core.tensor_parallel.layers.ColumnParallelLinear; enters by ModuleSpec, through
nxdt_nemo.megatron.transformer.attention.SelfAttention. May import torch and nxdt_nemo.runtime.
Proof: tests/megatron/test_kv_replication.py.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    custom_bwd,
    custom_fwd,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn

from nxdt_nemo.apex.fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp32
from nxdt_nemo.megatron.tensor_parallel.kv_heads import KVHeads
from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.select import current

__all__ = ["QKVParallelLinear"]

Offsets = tuple[tuple[int, int, int], ...]


class QKVParallelLinear(ColumnParallelLinear):
    """Y = X A^T + b; a rank keeps its query rows of A, and a copy of one group's key and value rows.

    S sequence, B micro-batch, H in, D features a head, N query heads, G groups, t tensor-parallel size, t / G copies.
      x          [S, B, H]             params_dtype; [S/t, B, H] with sequence parallelism
      weight     [N/t D, H]            query rows; bias [N/t D]
      kv_weight  [2 D, H]              key rows, then value rows; kv_bias [2 D]
      returns    [S, B, (N/t + 2) D]   queries, key, value: upstream's order for one group a rank; and None
    The parameters are apart because they differ in what becomes of gradients: those of the copies are summed over
    them once a step (megatron/distributed/finalize_model_grads.py), and count in a norm on the first of them only,
    by upstream's own mark for copies. Each parameter has besides upstream's marks
      run        (start, stop) of its rows in the undivided [(N + 2 G) D, H]
      kv_heads   KVHeads, on the copies
    Bytes received a rank are upstream's. Checkpoints hold the undivided A, in chunks of D rows.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        kv_heads: KVHeads,
        config: Any,
        init_method: Any,
        bias: bool = True,
        **upstreams: Any,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            bias=False,
            skip_weight_param_allocation=True,
            **upstreams,
        )
        self.kv_heads, self.head_size = kv_heads, config.kv_channels
        rank = self.tp_group.rank()
        first = kv_heads.copy(rank) == 0
        self.weight = self._parameter(kv_heads.query_run(rank), input_size)
        self.kv_weight = self._parameter(kv_heads.kv_run(rank), input_size, counts=first, copied=True)
        if bias:
            self.bias = self._parameter(kv_heads.query_run(rank))
            self.kv_bias = self._parameter(kv_heads.kv_run(rank), counts=first, copied=True)
        if config.perform_initialization:
            self._initialize(init_method)

    def _parameter(self, heads: tuple[int, int], *columns: int, counts: bool = True, copied: bool = False) -> Any:
        """Zeros for some heads' rows, with marks."""
        start, stop = (head * self.head_size for head in heads)
        device = None if self.config.use_cpu_initialization else current().device()
        made = nn.Parameter(torch.zeros(stop - start, *columns, dtype=self.config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(made, counts, 0, 1)
        marks = {"allreduce": True, "run": (start, stop), **({"kv_heads": self.kv_heads} if copied else {})}
        for name, value in marks.items():
            setattr(made, name, value)
        return made

    @torch.no_grad()
    def _initialize(self, init_method: Any) -> None:
        """Copies begin equal without being sent: each rank draws what all hold, and takes its rows of that.

        On the CPU that is the undivided weight, as upstream draws it; else all KV heads, from the random stream that
        tensor-parallel ranks share, and the query rows from the one that differs between them.
        """
        if self.config.use_cpu_initialization:
            heads = self.kv_heads.heads + 2 * self.kv_heads.groups
            whole = torch.empty(heads * self.head_size, self.input_size)
            init_method(whole)
            for param in (self.weight, self.kv_weight):
                param.copy_(whole[slice(*param.run)])
            return
        with get_cuda_rng_tracker().fork():
            init_method(self.weight)
        copies = self.kv_weight.new_empty(self.kv_heads.groups, *self.kv_weight.shape)
        init_method(copies.view(-1, self.input_size))
        self.kv_weight.copy_(copies[self.kv_heads.group(self.tp_group.rank())])

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """See the class. Takes no weight of the caller's and gathers no output."""
        y: Tensor = _Projection.apply(  # type: ignore[no-untyped-call]
            input_,
            self.weight,
            self.kv_weight,
            current().group_of(self.tp_group),
            self.sequence_parallel,
            self.gradient_accumulation_fusion,
        )
        return y if self.bias is None else y + torch.cat([self.bias, self.kv_bias]), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As upstream's at any other size: under `weight` and `bias` the undivided tensors, without copies."""
        found: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, param in self.named_parameters(recurse=False):
            found[prefix + name] = self._rows_of(param, prefix + name.removeprefix("kv_"), sharded_offsets)
        return found

    def _rows_of(self, param: Any, key: str, offsets: Offsets) -> ShardedTensorFactory:
        """A head's rows are a chunk, since the grid of chunks has to be regular."""
        first, axis = param.run[0] // self.head_size, len(offsets)
        chunks = self.kv_heads.heads + 2 * self.kv_heads.groups

        def build(key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> list[Any]:
            assert flattened_range is None, "state is saved in the parameter's shape here"
            return [
                ShardedTensor.from_rank_offsets(
                    key, rows, *offsets, (axis, first + place, chunks), replica_id=replica_id, prepend_axis_num=axis
                )
                for place, rows in enumerate(tensor.detach().split(self.head_size))
            ]

        copy = self.kv_heads.copy(self.tp_group.rank()) if hasattr(param, "kv_heads") else 0
        replica_id = (0, copy, parallel_state.get_data_parallel_rank(with_context_parallel=True))
        return ShardedTensorFactory(key, param, build, torch.cat, replica_id)


class _Projection(torch.autograd.Function):
    """x [W; W_kv]^T, with one gathering of x and one reduction of its gradient for both.

    Upstream's LinearWithGradAccumulationAndAsyncCommunication for two weights: with sequence parallelism this rank's
    part of x is kept, and gathered once more in backward; `fused` adds weight gradients to main_grad.
    """

    @staticmethod
    @custom_fwd  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, kv_weight: Tensor, group: Group, sequence_parallel: bool, fused: bool
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weights, ctx.group, ctx.sequence_parallel, ctx.fused = (weight, kv_weight), group, sequence_parallel, fused
        whole = group.ops.all_gather(x, 0, group) if sequence_parallel else x
        return torch.cat([whole.matmul(weight.t()), whole.matmul(kv_weight.t())], -1)

    @staticmethod
    @custom_bwd  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        [x], ops, group = ctx.saved_tensors, ctx.group.ops, ctx.group
        parts = dy.split([weight.shape[0] for weight in ctx.weights], -1)
        dx = parts[0].matmul(ctx.weights[0]) + parts[1].matmul(ctx.weights[1])
        if ctx.sequence_parallel:
            x, dx = ops.all_gather(x, 0, group), ops.reduce_scatter(dx, 0, group)
        else:
            dx = ops.all_reduce_(dx, group, "sum")
        d_weight, d_kv_weight = (
            _weight_gradient(x, part, weight, ctx.fused) if weight.requires_grad else None
            for part, weight in zip(parts, ctx.weights, strict=True)
        )
        return dx, d_weight, d_kv_weight, None, None, None


def _weight_gradient(x: Tensor, dy: Tensor, weight: Any, fused: bool) -> Tensor | None:
    """dy^T x; fused: added to the weight's main_grad, and what is returned stands for it where hooks wait for one."""
    x, dy = x.flatten(0, -2), dy.flatten(0, -2)
    if not fused:
        return dy.t().matmul(x)
    wgrad_gemm_accum_fp32(x, dy, weight.main_grad)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
