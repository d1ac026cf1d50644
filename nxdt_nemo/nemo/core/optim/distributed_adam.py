"""optim.name: distributed_fused_adam, Adam with its state sharded over the data-parallel ranks.

Room nemo/. Stands in for nemo.core.optim.distributed_adam.MegatronDistributedFusedAdam, a subclass of Apex internals.
The same ZeRO-1 as megatron-core's distributed optimizer here (megatron/optimizer/zero.py), with buffers of its own.
Gradients are reduced when they are first asked for after the backward passes: NeMo adds tensor-parallel norm gradients
and tied embeddings to main_grad before that. Proof: tests/nemo/test_zero.py.
Paper: Rajbhandari et al. 2019, arXiv:1910.02054, section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo.utils import str_to_dtype
from torch import Tensor, nn

from nxdt_nemo.apex._kernels.scale_norm import norms
from nxdt_nemo.apex.contrib.optimizers.distributed_fused_adam import DistributedFusedAdam
from nxdt_nemo.apex.optimizers import FusedAdam
from nxdt_nemo.errors import ConfigError
from nxdt_nemo.megatron.optimizer.sharded_state import (
    Loaded,
    Tensors,
    common_rate,
    load_pieces,
    state_template,
    whole_states,
)
from nxdt_nemo.megatron.optimizer.traced_zero import TracedBucket, alike, on_host, to_device
from nxdt_nemo.megatron.optimizer.zero import Bucket, Part, Piece, allocate, gather_parameters, reduce_gradients
from nxdt_nemo.nemo.core.optim.optimizer_with_main_params import add_to_main_grad
from nxdt_nemo.runtime.hosts import carries_host_memory
from nxdt_nemo.runtime.select import current

__all__ = ["MegatronDistributedFusedAdam"]


class MegatronDistributedFusedAdam(DistributedFusedAdam):
    """p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), each rank for its part of the parameters.

    params            parameters, or groups of them; float32 or bfloat16
    process_group     ranks that share the state (default: data- and context-parallel ranks)
    grad_sync_dtype   what gradients are sent in (default float32); they are added up in float32
    bucket_cap_mb     bytes of one reduce-scatter and all-gather, of float32 gradients, in MiB
    layout            Apex's arguments for where and when its buffers and copies are made (overlap_grad_sync,
                      contiguous_param_buffer, store_params, ...): here buffers are always contiguous, main parameters
                      float32, and all buckets' collectives under way together; no result depends on them, nor on
                      distribute_within_nodes and lock_timeout: all ranks of the group share the state
    Memory a rank, P parameters on d ranks: 8 P / d bytes of float32 state, 4 P of float32 gradients, and 4 P / d of
    main parameters where the model's are bf16 or steps are traced.
    Raises ConfigError for a state that is not float32, for amsgrad and for disable_distributed_parameters.
    """

    overlap_grad_sync = False  # for NeMo: reduce nothing before the last backward pass
    contiguous_param_buffer = False  # for NeMo: there is none to be made later

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        disable_distributed_parameters: bool = False,
        distribute_within_nodes: bool = False,
        lock_timeout: float | None = None,
        *,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        dtype: Any = torch.float32,
        grad_sync_dtype: Any = None,
        process_group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float = 100,
        **layout: Any,
    ) -> None:
        if disable_distributed_parameters:
            _stop("disable_distributed_parameters", True, "use optim.name=fused_adam, which shards nothing")
        if str_to_dtype(dtype) != torch.float32:
            _stop("dtype", dtype, "use fp32")
        if amsgrad:
            _stop("amsgrad", amsgrad, "use False")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        torch.optim.Optimizer.__init__(self, params, defaults)
        self._group = process_group or parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._sync_dtype = torch.float32 if grad_sync_dtype is None else str_to_dtype(grad_sync_dtype)
        self._bucket_elements = max(1, int(bucket_cap_mb * 2**20 / 4))
        self._adam_w_mode = adam_w_mode
        self.buckets: list[Bucket | TracedBucket] = []
        self._placed: set[nn.Parameter] = set()
        self.optimizer: FusedAdam | None = None
        self._steps = 0
        self._reduced = False
        self._norm: Tensor | None = None

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters, in the groups' order."""
        for group in self.param_groups:
            yield from group["params"]

    # --- buffers -------------------------------------------------------------------------------------

    def init_params_bucket(self, params: Iterable[nn.Parameter] | nn.Parameter, **_: Any) -> None:
        """Place parameters that are not placed yet in buckets of their own, by dtype and bucket_cap_mb."""
        wanted = [params] if isinstance(params, nn.Parameter) else list(dict.fromkeys(params))
        fresh = [param for param in wanted if param not in self._placed and param.requires_grad]
        for param in fresh:
            if param.dtype not in (torch.float32, torch.bfloat16):
                _stop("name", "distributed_fused_adam", f"it trains float32 and bfloat16 parameters, not {param.dtype}")
        for params in self._divided(fresh):
            for bucket in _capped(params, self._bucket_elements):
                self.buckets.append(self._traced(bucket) if current().traced else allocate(bucket, self._group))
        for param in fresh:
            self._placed.add(param)
            if param.dtype != torch.float32:
                param.register_post_accumulate_grad_hook(add_to_main_grad)

    def _divided(self, params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """What can be in one bucket: parameters of one dtype, where steps are traced also stepped and counted alike."""
        if current().traced:
            groups = {param: number for number, group in enumerate(self.param_groups) for param in group["params"]}
            return alike(params, groups.__getitem__)
        dtypes = dict.fromkeys(param.dtype for param in params)
        return [[param for param in params if param.dtype == dtype] for dtype in dtypes]

    def _traced(self, params: list[nn.Parameter]) -> TracedBucket:
        """A bucket of parameters that keep their places; each has a float32 main_grad, see allocate."""
        for param in params:
            param.main_grad = torch.zeros(param.shape).to(param.device)  # type: ignore[attr-defined]
            if param.dtype == torch.float32:
                param.grad = param.main_grad  # type: ignore[attr-defined]
        return TracedBucket.of(params, self._group, 1.0 / self._group.size(), self._sync_dtype)

    def init_params(self, params: Iterable[nn.Parameter] | nn.Parameter | None = None, **_: Any) -> None:
        """As init_params_bucket; without an argument all of the optimizer's parameters."""
        self.init_params_bucket(self.parameters() if params is None else params)

    def init_param_buffer(self) -> None:
        """Nothing: parameters have been in one buffer a bucket since init_params."""

    def _stepper(self) -> FusedAdam:
        """Adam on the pieces. Made at the first step or load: until then weights may be loaded into the model."""
        if self.optimizer is None:
            self.init_params()
            groups = [{**group, "params": self._mains(group["params"])} for group in self.param_groups]
            self.optimizer = FusedAdam(groups, adam_w_mode=self._adam_w_mode)
            for piece in self._pieces():
                piece.begin(self.optimizer.state)
        return self.optimizer

    def _mains(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """What is stepped of these on this rank."""
        pieces = {param: piece for bucket in self.buckets for param, piece in bucket.pieces.items()}
        return [piece.main for piece in dict.fromkeys(pieces[param] for param in params if param in pieces)]

    def _pieces(self) -> list[Piece | TracedBucket]:
        return list(dict.fromkeys(piece for bucket in self.buckets for piece in bucket.pieces.values()))

    def _collected(self) -> list[Tensor]:
        """The main parameters' gradients, after grad_sync."""
        pieces = self._pieces()
        for piece in pieces:
            piece.collect()
        return [grad for piece in pieces if (grad := piece.main.grad) is not None]

    def _grads_for_norm(self, params: Iterable[nn.Parameter] | None) -> list[Tensor]:
        """This rank's part of the gradients of these. A TracedBucket knows what of it counts: params do not matter."""
        wanted = None if params is None else set(params)
        grads = []
        for piece in self._pieces():
            if isinstance(piece, TracedBucket):
                grads += piece.counted()
            elif wanted is None or piece.param in wanted:
                grads.append(piece.grad)
        return grads

    @torch.no_grad()
    def reload_model_params(self) -> None:
        """Take the main parameters from the model's again, after weights were loaded into it."""
        for piece in self._pieces():
            piece.refresh()

    # --- gradients -----------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients; the buffers stay, since the model holds them as main_grad."""
        self._reduced, self._norm = False, None
        if self.optimizer is None and current().traced:  # a first step begins: its graph is to be that of all
            self._stepper()
            current().cut()
        for bucket in self.buckets:
            bucket.clear()
            for param, _, _ in bucket.spans:
                param.grad = param.main_grad if param.dtype == torch.float32 else None  # type: ignore[attr-defined]

    @contextmanager
    def no_sync(self, greedy_grad_copy: bool = False) -> Iterator[None]:
        """Within it gradients stay this rank's own, as they do without it until the norm or the step."""
        yield

    def try_grad_sync(self, params: Iterable[nn.Parameter]) -> None:
        """Nothing: see no_sync."""

    def grad_sync(self) -> None:
        """Average the gradients over the ranks, each rank its part, once between two calls of zero_grad."""
        if self._reduced:
            return
        self._reduced = True
        for bucket in self.buckets:
            for param, _, _ in bucket.spans:
                _collect(param)
        with torch.no_grad():
            reduce_gradients([bucket for bucket in self.buckets if isinstance(bucket, Bucket)], self._sync_dtype)

    def _finish_bucket_grad_sync(self) -> None:
        """Nothing is under way: NeMo still adds up tied embeddings after this."""

    def _try_start_bucket_grad_sync(self, params: Any = None, ignore_last_bucket: bool = False) -> None:
        """Nothing: see no_sync."""

    def _try_start_bucket_param_sync(self, params: Any = None) -> None:
        """Nothing: parameters are whole when step returns."""

    def param_sync(self) -> None:
        """Nothing: parameters are whole when step returns."""

    @torch.no_grad()
    def grad_norm(
        self, parameters: Iterable[nn.Parameter] | None = None, norm_type: float = 2.0, force: bool = False
    ) -> Tensor:
        """The gradients' 2-norm over all ranks, float32, shape []; kept until zero_grad unless `force`.

        parameters   those that count on this rank: neither shared with another stage nor a tensor-parallel copy
        """
        if float(norm_type) != 2.0:
            raise NotImplementedError(f"the norm of sharded gradients is a 2-norm, not {norm_type}")
        if self._norm is None or force:
            self.grad_sync()
            grads = self._grads_for_norm(parameters)
            total = norms(grads).square().sum() if grads else torch.zeros((), device=next(self.parameters()).device)
            for group in (self._group, parallel_state.get_model_parallel_group()):
                dist.all_reduce(total, group=group)
            self._norm = total.sqrt()
        return self._norm

    @torch.no_grad()
    def clip_grad_norm(
        self, max_norm: float, parameters: Iterable[nn.Parameter] | None = None, norm_type: float = 2.0
    ) -> Tensor:
        """Scale the gradients by max_norm / (norm + 1e-6) where that is less than one; returns the norm from before."""
        norm = self.grad_norm(parameters, norm_type)
        if grads := self._collected():
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    # --- step ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scaler: Any = None) -> Any:
        """Step this rank's pieces and gather what the others have stepped; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inner = self._stepper()
        self.grad_sync()
        self._collected()
        for group, mine in zip(self.param_groups, inner.param_groups, strict=True):
            mine.update({name: value for name, value in group.items() if name != "params"})
            mine["step"] = self._steps
        inner.step()
        for piece in self._pieces():
            piece.drop()
            piece.publish(self._steps + 1)
        self._count(self._steps + 1)
        gather_parameters([bucket for bucket in self.buckets if isinstance(bucket, Bucket)])
        return loss

    def _count(self, steps: int) -> None:
        """The number of steps made, in each group: one without pieces on this rank counts too."""
        self._steps = steps
        for group in self.param_groups:
            group["step"] = steps

    # --- state ---------------------------------------------------------------------------------------

    def _state_of(self, part: Part) -> Tensors:
        return part.state(self._stepper().state)

    def state_dict(self) -> dict[str, Any]:
        """The groups, with parameters as numbers; no tensors, which sharded_state_dict has."""
        numbers = {param: place for place, param in enumerate(self.parameters())}
        groups = [{**group, "params": [numbers[param] for param in group["params"]]} for group in self.param_groups]
        return self._wrapped({"state": {}, "param_groups": groups})

    def _wrapped(self, inner: dict[str, Any]) -> dict[str, Any]:
        """In NeMo's places: those of MainParamsOptimizerWrapper where parameters are bf16, else of FusedAdam."""
        return {"optimizer": inner} if any(param.dtype != torch.float32 for param in self._placed) else inner

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], optimizer_state_dict: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The groups, and under `state` the pieces' tensors by name (docs/checkpoints.md).

        optimizer_state_dict   what state_dict gave when saving; None when loading
        """
        inner = self._stepper()
        params = [param for param in self.parameters() if param in self._placed]
        buckets = on_host(self.buckets, inner.state, read=optimizer_state_dict is not None)
        if optimizer_state_dict is None:
            state = state_template(buckets, params, self._state_of, model_sharded_state_dict)
            groups: list[dict[str, Any]] = [{} for _ in self.param_groups]
        else:
            host = _host_group(self._group)
            state = whole_states(buckets, params, self._state_of, model_sharded_state_dict, {self._group: host})
            groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        return self._wrapped({"state": state, "param_groups": groups})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what sharded_state_dict(model) gave, after it was loaded.

        Of groups that megatron-core's optimizer had saved, which holds other parameters in them, the learning rate.
        """
        loaded = Loaded.of(state_dict)
        self._stepper()
        saved = loaded.for_groups(len(self.param_groups))
        if any("wd_mult" in group for group in saved):
            saved = [common_rate(saved)] * len(self.param_groups)
        for group, values in zip(self.param_groups, saved, strict=True):
            group.update({name: value for name, value in values.items() if name != "params"})
        self._count(loaded.steps)
        params = [param for param in self.parameters() if param in self._placed]
        buckets = on_host(self.buckets, self._stepper().state, read=False)
        hosts = {self._group: _host_group(self._group)}
        to_device(load_pieces(buckets, params, self._state_of, loaded, hosts))


def _collect(param: Any) -> None:
    """Bring in a gradient that did not come by way of backward into the buffer."""
    if param.grad is not None and param.grad is not param.main_grad:
        param.main_grad.add_(param.grad)
        param.grad = param.main_grad if param.dtype == torch.float32 else None


def _capped(params: list[nn.Parameter], elements: int) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters, together at most `elements` unless one alone has more."""
    found: list[nn.Parameter] = []
    size = 0
    for param in params:
        if found and size + param.numel() > elements:
            yield found
            found, size = [], 0
        found.append(param)
        size += param.numel()
    if found:
        yield found


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same ranks: pieces of a checkpoint go from host to host."""
    if carries_host_memory(group):
        return group
    hosts: dist.ProcessGroup = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
    return hosts


def _stop(key: str, value: Any, fix: str) -> None:
    raise ConfigError(f"model.optim.{key}={value} cannot run with distributed_fused_adam", fix=fix)
