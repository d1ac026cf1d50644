"""The kernels behind jit_fuser, through upstream's own entry points, against upstream's formulas run eagerly.

The same function runs in two ranks: one with the backend active, one with stock megatron-core whose torch.compile is
switched off. Figures are errors / largest element of the reference; float64 references start from the same rounded
inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.reference import STOCK_ENV

pytestmark = pytest.mark.ranks

S, B, H = 7, 5, 64
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
Found = dict[str, torch.Tensor]
Both = Callable[..., tuple[Any, Any]]


@pytest.fixture
def both(active: Callable[..., Any], gloo: Gloo) -> Both:
    """both(function, *args): its result with the backend, and with upstream's eager formulas."""
    return lambda function, *args: (active(function, *args), gloo(1, function, *args, env=STOCK_ENV)[0])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [S, B, H], bias [H] and a direction like x. Both tails of an activation and its middle are in x."""
    torch.manual_seed(4)
    x, bias, direction = 3 * torch.randn(S, B, H), torch.randn(H), torch.randn(S, B, H)
    x[0, 0, :6] = torch.tensor([-10.0, -5.0, -1e-3, 0.0, 5.0, 10.0])
    return x.to(dtype), bias.to(dtype), direction.to(dtype)


def with_gradients(y: torch.Tensor, direction: torch.Tensor, **leaves: torch.Tensor) -> Found:
    gradients = torch.autograd.grad(y, list(leaves.values()), direction)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def origins() -> list[str]:
    """Whose code computes."""
    from megatron.core.fusions import fused_bias_dropout, fused_bias_gelu, fused_bias_swiglu

    found = [fused_bias_gelu.bias_gelu, fused_bias_gelu.bias_gelu_back, fused_bias_swiglu.swiglu]
    found += [fused_bias_swiglu.swiglu_back, fused_bias_dropout.get_bias_dropout_add(training=True, fused=True)]
    return [f"{function.__module__} {hasattr(function, '_torchdynamo_orig_callable')}" for function in found]


def test_the_two_sides_are_ours_and_upstreams_eager_one(both: Both) -> None:
    ours, theirs = both(origins)
    assert {origin.split(".")[0] for origin in ours} == {"nxdt_nemo"}
    assert {origin.split(".")[0] for origin in theirs} == {"megatron"}
    assert all(origin.endswith(" False") for origin in theirs)  # not compiled


# --- activations -------------------------------------------------------------------------------------------------


def gelu(dtype: torch.dtype) -> Found:
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl

    x, bias, direction = inputs(dtype)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    return with_gradients(bias_gelu_impl(x, bias), direction, dx=x, dbias=bias)


def gelu_formula(dtype: torch.dtype, approximate: str = "tanh") -> Found:
    x, bias, direction = (tensor.double() for tensor in inputs(dtype))
    x, bias = x.requires_grad_(), bias.requires_grad_()
    return with_gradients(F.gelu(x + bias, approximate=approximate), direction, dx=x, dbias=bias)


def swiglu(dtype: torch.dtype, biased: bool, flat: bool) -> Found:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    x, bias, direction = inputs(dtype)
    x, direction = (x.view(-1, H), direction.view(-1, H)) if flat else (x, direction)
    leaves = {"dx": x.requires_grad_()} | ({"dbias": bias.requires_grad_()} if biased else {})
    return with_gradients(bias_swiglu_impl(x, leaves.get("dbias")), direction[..., : H // 2], **leaves)


def swiglu_formula(dtype: torch.dtype, biased: bool, flat: bool) -> Found:
    x, bias, direction = (tensor.double() for tensor in inputs(dtype))
    x, direction = (x.view(-1, H), direction.view(-1, H)) if flat else (x, direction)
    leaves = {"dx": x.requires_grad_()} | ({"dbias": bias.requires_grad_()} if biased else {})
    gate, up = (x + bias if biased else x).chunk(2, -1)
    return with_gradients(gate * torch.sigmoid(gate) * up, direction[..., : H // 2], **leaves)


def weighted_swiglu(dtype: torch.dtype, of_weights: torch.dtype) -> Found:
    """As a mixture of experts calls it: a weight for each token, of a wider type than the tokens."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

    x, _, direction = inputs(dtype)
    x, weights = x.view(-1, H).requires_grad_(), torch.rand(S * B, 1).to(of_weights).requires_grad_()
    y = weighted_bias_swiglu_impl(x, None, weights)
    return with_gradients(y, direction.view(-1, H)[:, : H // 2], dx=x, dweights=weights)


SWIGLU = [(True, False), (False, False), (True, True)]  # biased, flat


def assert_within(ours: Found, expected: Found, y: float, gradients: float) -> None:
    assert ours.keys() == expected.keys()
    for name, reference in expected.items():
        assert error(ours[name], reference) <= (y if name == "y" else gradients), name


def test_gelu_in_float32(both: Both) -> None:
    """Measured: y 6e-8 from both. The gradients 5e-7: each side has 3e-7 of cancellation in its 1 - tanh^2."""
    ours, theirs = both(gelu, F32)
    assert_within(ours, theirs, 2e-7, 1e-6)
    assert_within(ours, gelu_formula(F32), 2e-7, 1e-6)


@pytest.mark.parametrize("biased, flat", SWIGLU)
def test_swiglu_in_float32(both: Both, biased: bool, flat: bool) -> None:
    """The value is the same to the bit, from the same three operations; the gradient is 1e-7 from upstream's."""
    ours, theirs = both(swiglu, F32, biased, flat)
    assert_within(ours, theirs, 0.0, 5e-7)
    assert_within(ours, swiglu_formula(F32, biased, flat), 2e-7, 5e-7)


def test_gelu_in_float64(both: Both) -> None:
    """Upstream writes sqrt(2 / pi) with 8 digits and its products with 10, which is 3e-10."""
    ours, theirs = both(gelu, F64)
    assert_within(ours, theirs, 1e-9, 1e-9)
    assert_within(ours, gelu_formula(F64), 1e-15, 1e-15)


@pytest.mark.parametrize("biased, flat", SWIGLU)
def test_swiglu_in_float64(both: Both, biased: bool, flat: bool) -> None:
    ours, theirs = both(swiglu, F64, biased, flat)
    assert_within(ours, theirs, 0.0, 1e-15)


@pytest.mark.parametrize(
    "function, formula, case",
    [(gelu, gelu_formula, ()), *((swiglu, swiglu_formula, case) for case in SWIGLU)],
)
def test_in_bfloat16_it_is_nearer_to_the_formula_than_upstream(
    both: Both, function: Any, formula: Any, case: tuple[bool, ...]
) -> None:
    """Two or three roundings of 2^-9 on the way; upstream's, uncompiled, rounds after each of ten operations."""
    ours, theirs = both(function, BF16, *case)
    expected = formula(BF16, *case)
    assert_within(ours, expected, 2**-7, 2**-7)
    assert_within(ours, theirs, 2**-6, 2**-6)
    for name, reference in expected.items():
        assert ours[name].dtype == theirs[name].dtype == BF16
        assert error(ours[name], reference) <= error(theirs[name], reference), name


@pytest.mark.parametrize(
    "dtype, of_weights, tolerance", [(F32, F32, 5e-7), (BF16, BF16, 2**-6), (BF16, F32, 2**-6), (F64, F64, 1e-15)]
)
def test_swiglu_with_a_weight_for_each_token(
    both: Both, dtype: torch.dtype, of_weights: torch.dtype, tolerance: float
) -> None:
    ours, theirs = both(weighted_swiglu, dtype, of_weights)
    assert {name: tensor.dtype for name, tensor in ours.items()} == {"y": dtype, "dx": dtype, "dweights": of_weights}
    assert_within(ours, theirs, 0.0, tolerance)


def test_another_gelu_would_be_seen(both: Both) -> None:
    """The exact one, by erf."""
    _, theirs = both(gelu, F32)
    for name, other in gelu_formula(F32, "none").items():
        assert error(other, theirs[name]) > 20e-6, name


def checked() -> list[bool]:
    """Derivatives against differences, in float64."""
    from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_fused_train
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl

    torch.manual_seed(5)
    x, bias, residual = (torch.randn(*shape, dtype=F64).requires_grad_() for shape in ((3, 2, 8), (8,), (3, 2, 8)))
    rows, weights = torch.randn(4, 8, dtype=F64).requires_grad_(), torch.rand(4, 1, dtype=F64).requires_grad_()

    def added(*tensors: torch.Tensor) -> torch.Tensor:
        return bias_dropout_add_fused_train((tensors[0], tensors[1]), tensors[2], 0.0)

    def dropped(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(6)
        return bias_dropout_add_fused_train((tensors[0], tensors[1]), tensors[2], 0.4)

    return [
        torch.autograd.gradcheck(bias_gelu_impl, (x, bias)),
        torch.autograd.gradcheck(bias_swiglu_impl, (x, bias)),
        torch.autograd.gradcheck(lambda one: bias_swiglu_impl(one, None), (x,)),
        torch.autograd.gradcheck(lambda one, two: weighted_bias_swiglu_impl(one, None, two), (rows, weights)),
        torch.autograd.gradcheck(added, (x, bias, residual)),
        torch.autograd.gradcheck(dropped, (x, bias, residual)),
    ]


def test_derivatives_are_those_of_the_values(active: Callable[..., Any]) -> None:
    assert active(checked) == [True] * 6


# --- bias, dropout, residual -------------------------------------------------------------------------------------


def dropout(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], biased: bool, prob: float, graph: bool, seed: int = 8
) -> tuple[Found, list[bool]]:
    """What is computed and the state of the random numbers after it; whether x, bias and residual are as before."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    x, bias, residual = (tensor.to(dtype) for tensor, dtype in zip(inputs(F32), dtypes, strict=True))
    given = [x, residual, *([bias] if biased else [])]
    before = [(tensor.clone(), tensor._version) for tensor in given]
    names = ["dx", "dresidual", "dbias"][: len(given)]
    torch.manual_seed(seed)
    with torch.set_grad_enabled(graph):
        leaves = {name: tensor.requires_grad_(graph) for name, tensor in zip(names, given, strict=True)}
        y = get_bias_dropout_add(training=True, fused=True)((x, bias if biased else None), residual, prob)
    state = torch.get_rng_state()
    direction = torch.randn(y.shape).to(y.dtype)
    found = with_gradients(y, direction, **leaves) if graph else {"y": y}
    same = [torch.equal(one, old) and one._version == at for one, (old, at) in zip(given, before, strict=True)]
    return {**found, "random state": state}, same


DTYPES = [
    (F32, F32, F32),
    (BF16, BF16, BF16),
    (BF16, BF16, F32),  # the residual of mixed precision: x's type is the result's
    (BF16, F32, F32),  # a wide bias widens the result, as upstream's does
]


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("prob", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_bias_dropout_add_is_upstreams_to_the_bit(
    both: Both, dtypes: tuple[torch.dtype, ...], biased: bool, prob: float, graph: bool
) -> None:
    """The same random numbers are drawn, the same number of them, and nothing that was handed in is written to."""
    (ours, same), (theirs, _) = both(dropout, dtypes, biased, prob, graph)
    assert ours.keys() == theirs.keys() and len(ours) == (2 + 2 + biased if graph else 2)
    for name, reference in theirs.items():
        assert ours[name].dtype == reference.dtype and torch.equal(ours[name], reference), name
    assert same == [True] * (2 + biased)
    if not biased or dtypes[1] == dtypes[0]:
        assert ours["y"].dtype == dtypes[0]


def test_other_random_numbers_would_be_seen(both: Both) -> None:
    ours, _ = both(dropout, DTYPES[0], True, 0.1, True, 8)
    _, theirs = both(dropout, DTYPES[0], True, 0.1, True, 9)
    for name in ("y", "dx", "dbias"):
        assert not torch.equal(ours[0][name], theirs[0][name]), name
