"""One layer of experts, forward and backward, in a layout: upstream's on stock ranks, and the backend's.

Room testing/. Both sides get the same weights, tokens and output gradients from seeds. They are compared at the same
layout, rank by rank, since a capacity counts a rank's own tokens. Stock ranks import upstream and nxdt_nemo.testing
only. Proof: tests/megatron/test_moe.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from nxdt_nemo.testing.mistakes import expert_left_out, rows_dropped
from nxdt_nemo.testing.recipe import Layout

if TYPE_CHECKING:
    import torch

__all__ = [
    "BATCH",
    "EXPERTS",
    "HIDDEN",
    "TOKENS",
    "Case",
    "Fault",
    "Found",
    "config_of",
    "in_layout",
    "layer_of",
    "run",
    "run_all",
    "worst",
]

HIDDEN, FFN, EXPERTS, TOKENS, BATCH = 16, 24, 4, 12, 2
Side = Literal["stock", "ours"]
Fault = Literal["", "capacity one too large", "rows dropped", "an expert's gradient left out", "tokens not put back"]
Found = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One setting.

    fields   of the TransformerConfig, both sides
    own      of ours only: moe_grouped_gemm, gradient_accumulation_fusion
    marks    attributes of our config: moe_dropless_bound, token_shuffle_group_size
    dtype    of weights and activations
    training what the layer is in
    alike    all tokens of a rank want the same two experts, those of another rank other ones
    fault    a mistake of ours
    """

    fields: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    training: bool = True
    alike: bool = False
    fault: Fault = ""

    def by(self, fault: Fault = "", marks: dict[str, Any] | None = None, **own: Any) -> Case:
        """This case by other means: moe_grouped_gemm=True, marks={"moe_dropless_bound": "worst"}, ..."""
        return replace(self, own=self.own | own, marks=self.marks | (marks or {}), fault=fault)


def run_all(cases: dict[str, Case], layout: Layout, side: Side) -> dict[str, Found]:
    """What each case computes on this rank, see run."""
    with in_layout(layout, side):
        return {name: run(case, layout, side) for name, case in cases.items()}


@contextmanager
def in_layout(layout: Layout, side: Side) -> Iterator[None]:
    """megatron-core's parallel state for a layout, while the context is open."""
    if side == "stock":
        _stub_cuda()
    from megatron.core import parallel_state

    from nxdt_nemo.testing.ours import forget_groups

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp or None,
    )
    try:
        yield
    finally:
        forget_groups()


def _stub_cuda() -> None:
    """What a layer of experts asks of CUDA and NCCL: a stream, sizes on the host, parts that differ in size."""
    import torch
    import torch.distributed as dist

    from nxdt_nemo.testing.reference import _stub_cuda as stub_models

    stub_models()

    class Stream:
        def wait_stream(self, _: Any) -> None: ...
        def record_event(self) -> Any:
            return self

        def synchronize(self) -> None: ...

    def on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    def all_gather(parts: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        for source, part in zip(dist.get_process_group_ranks(group), parts, strict=True):
            part.copy_(mine if source == dist.get_rank() else part)
            dist.broadcast(part, source, group=group)

    def reduce_scatter(mine: torch.Tensor, parts: list[torch.Tensor], group: Any) -> None:
        for rank, part in enumerate(parts):
            total = part.clone()
            dist.all_reduce(total, group=group)
            if rank == group.rank():
                mine.copy_(total)

    stream = Stream()
    stubs: list[tuple[Any, str, Any]] = [
        (torch.cuda, "Stream", lambda *_, **__: stream),
        (torch.cuda, "current_stream", lambda *_: stream),
        (torch.cuda, "stream", lambda _: nullcontext()),
        (dist, "all_gather", all_gather),
        (dist, "reduce_scatter", reduce_scatter),
    ]
    for name in ("moe_utils", "token_dispatcher"):
        module = importlib.import_module(f"megatron.core.transformer.moe.{name}")
        stubs.append((module, "maybe_move_tensor_to_cpu", on_the_host))
    for place, name, stub in stubs:
        setattr(place, name, stub)


def config_of(case: Case, layout: Layout, side: Side) -> Any:
    """Mixtral's layer: SwiGLU, the best two of four experts, none dropped, no auxiliary loss."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "ffn_hidden_size": FFN,
        "moe_ffn_hidden_size": FFN,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": True,
        "use_cpu_initialization": True,
        "params_dtype": getattr(torch, case.dtype),
        "bf16": case.dtype == "bfloat16",
        "tensor_model_parallel_size": layout.tp,
        "context_parallel_size": layout.cp,
        "sequence_parallel": layout.sp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp or layout.tp,
    }
    config = TransformerConfig(**fields | case.fields | (case.own if side == "ours" else {}))
    for name, value in case.marks.items() if side == "ours" else ():
        setattr(config, name, value)
    return config


def layer_of(case: Case, layout: Layout, side: Side) -> Any:
    """A module whose `layer.mlp` is the layer, its weights this rank's part of what the seed gives."""
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module

    from nxdt_nemo.testing.weights import Ranks, load

    config = config_of(case, layout, side)
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=config.moe_grouped_gemm).submodules.mlp
    if side == "ours":
        from nxdt_nemo.megatron.models.backends import adapt

        spec = adapt(spec)
    mlp = build_module(spec, config=config)
    mlp.train(case.training)
    holder = torch.nn.Module()
    holder.layer = torch.nn.Module()
    holder.layer.mlp = mlp
    load(holder, weights_of(config), config.gated_linear_unit, Ranks.here())
    return holder


def weights_of(config: Any) -> dict[str, Any]:
    """The undivided layer's, by SequentialMLP's names."""
    import torch

    draw = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Any:
        return torch.randn(*shape, generator=draw).mul(0.5).to(config.params_dtype)

    rows = FFN * (2 if config.gated_linear_unit else 1)
    weights = {"layer.mlp.router.weight": drawn(EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        name = f"layer.mlp.experts.local_experts.{expert}.linear_fc"
        weights |= {f"{name}1.weight": drawn(rows, HIDDEN), f"{name}2.weight": drawn(HIDDEN, FFN)}
    if config.moe_shared_expert_intermediate_size is not None:
        size = config.moe_shared_expert_intermediate_size
        weights["layer.mlp.shared_experts.linear_fc1.weight"] = drawn(2 * size, HIDDEN)
        weights["layer.mlp.shared_experts.linear_fc2.weight"] = drawn(HIDDEN, size)
    return weights


def tokens_of(case: Case, rank: int, router: torch.Tensor) -> tuple[Any, Any]:
    """A rank's own tokens [S, B, H] and the gradient of its output."""
    import torch

    draw = torch.Generator().manual_seed(100 + rank)
    x, dy = (torch.randn(TOKENS, BATCH, HIDDEN, generator=draw) for _ in range(2))
    if case.alike:
        x = x.mul(0.3) + router.roll(-2 * rank, 0)[:2].sum(0)
    dtype = getattr(torch, case.dtype)
    return x.to(dtype).requires_grad_(), dy.to(dtype)


def run(case: Case, layout: Layout, side: Side) -> Found:
    """output, input gradient, gradients by global name, which experts each token went to, auxiliary losses."""
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe import moe_utils

    from nxdt_nemo.testing.weights import Ranks, global_names

    model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)
    holder = layer_of(case, layout, side)
    layer = holder.layer.mlp
    layer.set_layer_number(1)
    for parameter in layer.parameters() if layer.config.gradient_accumulation_fusion else ():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    routed: list[Any] = []
    layer.router.register_forward_hook(lambda _, __, found: routed.append(found[1].detach().clone()))
    moe_utils.get_moe_layer_wise_logging_tracker().clear()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)  # the shape that schedules give it
    x, dy = tokens_of(case, dist.get_rank(), layer.router.weight.detach())
    with fault_of(case.fault):
        y, bias = layer(x)
        assert bias is None
        y.backward(dy)
    found = {"output": y.detach(), "input gradient": x.grad, "routed": routed[0]}
    for name, parameter in global_names(holder, weights_of(layer.config), Ranks.here()):
        grad = parameter.grad if parameter.grad is not None else parameter.main_grad
        found[name.removeprefix("layer.mlp.")] = grad.detach().clone().contiguous()
    for name, entry in moe_utils.get_moe_layer_wise_logging_tracker().items():
        found[name] = entry["values"].clone()
    return found


def fault_of(name: Fault) -> AbstractContextManager[Any]:
    """A mistake of ours or of upstream's own functions, made while the context is open."""
    if not name:
        return nullcontext()
    if name == "capacity one too large":
        upstream = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        plain = upstream.get_capacity
        return mock.patch.object(upstream, "get_capacity", lambda *args, **named: plain(*args, **named) + 1)
    if name == "rows dropped":
        return rows_dropped()
    if name == "an expert's gradient left out":
        return expert_left_out()
    ours = importlib.import_module("nxdt_nemo.megatron.transformer.moe.moe_layer")
    return mock.patch.object(ours, "unshuffle", lambda x, order, group: x)


def worst(left: Found, right: Found) -> tuple[float, str]:
    """The largest error of a tensor, relative to its largest element, and whose it is; routes must be the same."""
    if left.keys() != right.keys():
        return float("inf"), f"{sorted(left.keys() ^ right.keys())}"
    errors = {}
    for name, a in left.items():
        b = right[name]
        if name == "routed":
            errors[name] = 0.0 if a.equal(b) else float("inf")
        else:
            a, b = a.double(), b.double()
            errors[name] = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
    where = max(errors, key=lambda name: errors[name])
    return errors[where], where
