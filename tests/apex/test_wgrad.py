"""Weight gradients added to main_grad by their product: against float64, and as megatron-core's layers call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nxdt_nemo.apex import fused_weight_gradient_mlp_cuda
from nxdt_nemo.apex.fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp16, wgrad_gemm_accum_fp32
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pytest_plugin import Gloo

ROWS, OUT, IN = 37, 12, 20
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
AssertWithin = Callable[..., None]


@pytest.fixture(params=["in place", "traced"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's own way, and that of one that traces."""
    if request.param == "traced":
        monkeypatch.setattr(fused_weight_gradient_mlp_cuda, "TRACED_DEVICES", frozenset({"cpu"}))


def inputs(dtype: torch.dtype, main_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """total_input [ROWS, IN], grad_output [ROWS, OUT] and a main_grad [OUT, IN] that is not zero."""
    x, g, main = torch.randn(ROWS, IN), torch.randn(ROWS, OUT), 3 * torch.randn(OUT, IN)
    return x.to(dtype), g.to(dtype), main.to(main_dtype)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "dtype, main_dtype, tolerance",
    [
        (F32, F32, 5e-7),  # 37 products, summed in another order
        (BF16, BF16, 2**-8),  # rounded once, after the addition
        (F16, F16, 2**-11),
        (BF16, F32, 2**-8),  # the product is rounded, the sum is not
        (F16, F32, 2**-11),
    ],
)
def test_the_product_is_added(
    dtype: torch.dtype, main_dtype: torch.dtype, tolerance: float, assert_within: AssertWithin
) -> None:
    x, g, main = inputs(dtype, main_dtype)
    expected = main.double() + g.double().t() @ x.double()
    given = [tensor.clone() for tensor in (x, g)]
    function = wgrad_gemm_accum_fp32 if main_dtype == F32 else wgrad_gemm_accum_fp16
    assert function(x, g, main) is None  # in place, and nothing to mistake for a result
    assert main.dtype == main_dtype
    assert_within(main, expected, tolerance)
    assert torch.equal(x, given[0]) and torch.equal(g, given[1])


def test_gradients_add_up(assert_within: AssertWithin) -> None:
    main = torch.zeros(OUT, IN)
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    for _ in range(4):
        x, g, _ = inputs(F32, F32)
        expected += g.double().t() @ x.double()
        wgrad_gemm_accum_fp32(x, g, main)
    assert_within(main, expected, 5e-7)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_narrower_product_is_rounded_before_it_is_added_as_without_the_fusion(dtype: torch.dtype) -> None:
    """Without it autograd's gradient has the weight's type, and a hook adds it to main_grad. To the bit."""
    x, g, main = inputs(dtype, F32)
    expected = main + g.t().matmul(x).float()
    whole = main.clone().addmm_(g.t().float(), x.float())
    wgrad_gemm_accum_fp32(x, g, main)
    assert torch.equal(main, expected)
    assert not torch.equal(main, whole)


@pytest.mark.usefixtures("way")
def test_main_grad_may_be_a_part_of_a_buffer(assert_within: AssertWithin) -> None:
    x, g, main = inputs(F32, F32)
    buffer = torch.full((OUT * IN + 10,), 7.0)
    part = buffer[5:-5].view(OUT, IN)
    part.copy_(main)
    wgrad_gemm_accum_fp32(x, g, part)
    assert_within(buffer[5:-5].view(OUT, IN), main.double() + g.double().t() @ x.double(), 5e-7)
    assert buffer[:5].tolist() == buffer[-5:].tolist() == [7.0] * 5


def test_no_tensor_of_the_weights_size_is_made_in_between() -> None:
    """Which is what the fusion is for: addmm writes where it adds."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Made(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.operations: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operations.append(str(function))
            return function(*args, **(kwargs or {}))

    x, g, main = inputs(F32, F32)
    with Made() as made:
        wgrad_gemm_accum_fp32(x, g, main)
    assert made.operations == ["aten.t.default", "aten.addmm_.default"]


def test_no_rows_add_nothing() -> None:
    """A pipeline stage or an expert without tokens."""
    for dtype in (F32, BF16):
        main = torch.ones(OUT, IN)
        wgrad_gemm_accum_fp32(torch.zeros(0, IN, dtype=dtype), torch.zeros(0, OUT, dtype=dtype), main)
        assert torch.equal(main, torch.ones(OUT, IN))


def test_shapes_that_do_not_fit_are_an_error() -> None:
    x, g, main = inputs(F32, F32)
    with pytest.raises(RuntimeError):
        wgrad_gemm_accum_fp32(g, x, main)
    with pytest.raises(RuntimeError):
        wgrad_gemm_accum_fp32(x[:-1], g, main)


def layer(dtype: torch.dtype, main_dtype: torch.dtype, fused: bool) -> dict[str, Any]:
    """main_grad after two backward passes through megatron-core's linear layer, and what it calls."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import layers

    one = dist.group.WORLD  # has one rank here
    torch.manual_seed(21)
    weight = torch.nn.Parameter(torch.randn(OUT, IN).to(dtype))
    weight.main_grad = torch.randn(OUT, IN).to(main_dtype)  # type: ignore[attr-defined]
    for _ in range(2):
        x = torch.randn(ROWS, 2, IN).to(dtype).requires_grad_()
        y = layers.linear_with_grad_accumulation_and_async_allreduce(x, weight, None, fused, False, False, tp_group=one)
        weight.grad = None
        y.backward(torch.randn(y.shape).to(dtype))
        if not fused:
            weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined, arg-type]
    return {
        "main_grad": weight.main_grad,
        "module": layers.fused_weight_gradient_mlp_cuda.__name__,
        "available": layers._grad_accum_fusion_available,
    }


@pytest.mark.ranks
@pytest.mark.parametrize(
    "dtype, main_dtype, tolerance",
    [
        (F32, F32, 5e-7),  # upstream sums the product first
        (BF16, F32, 0.0),
        (BF16, BF16, 2**-7),  # upstream rounds twice
    ],
)
def test_upstreams_layer_gives_what_it_gives_without_the_fusion(
    gloo: Gloo, dtype: torch.dtype, main_dtype: torch.dtype, tolerance: float, assert_within: AssertWithin
) -> None:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    fused, plain = (gloo(1, layer, dtype, main_dtype, on, init=ACTIVE, env=ACTIVE_ENV)[0] for on in (True, False))
    assert fused["available"] and fused["module"] == fused_weight_gradient_mlp_cuda.__name__
    assert fused["main_grad"].dtype == main_dtype
    assert_within(fused["main_grad"], plain["main_grad"], tolerance)
