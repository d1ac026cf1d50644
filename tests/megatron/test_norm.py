"""Norm against the formula in float64 and against upstream's own norms; figures are errors / largest element."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nxdt_nemo.megatron.fusions import fused_layer_norm
from nxdt_nemo.megatron.fusions.fused_layer_norm import Norm, _RMSNorm
from nxdt_nemo.testing.live_bytes import SavedBytes

H = 48


def config(normalization: str, centred: bool = False, **fields: object) -> SimpleNamespace:
    known = {"sequence_parallel": False, "params_dtype": torch.float32, "persist_layer_norm": False}
    return SimpleNamespace(
        normalization=normalization, layernorm_zero_centered_gamma=centred, memory_efficient_layer_norm=False,
        **known | fields,
    )  # fmt: skip


def made(normalization: str, centred: bool, dtype: torch.dtype, eps: float = 1e-5) -> Norm:
    """A norm whose parameters are not the ones it starts with."""
    norm = Norm(config(normalization, centred), H, eps=eps).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(H) * 0.3 + (0.0 if centred else 1.0))
        if norm.bias is not None:
            norm.bias.copy_(torch.randn(H) * 0.3)
    return norm


def formula(norm: Norm, x: torch.Tensor, eps: float) -> torch.Tensor:
    weight, x = norm.weight.double(), x.double()
    if norm.zero_centered_gamma:
        weight = weight + 1
    if norm.bias is None:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + norm.bias.double()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


CASES = [  # kind, zero-centred, dtype, error of y, of the gradients
    ("LayerNorm", False, torch.float32, 1e-6, 2e-6),
    ("LayerNorm", True, torch.float32, 1e-6, 2e-6),
    ("RMSNorm", False, torch.float32, 1e-6, 2e-6),
    ("RMSNorm", True, torch.float32, 1e-6, 2e-6),
    ("LayerNorm", False, torch.bfloat16, 2**-8, 2**-6),
    ("LayerNorm", True, torch.bfloat16, 2**-7, 2**-6),  # weight + 1 is rounded as well
    ("RMSNorm", False, torch.bfloat16, 2**-8, 2**-6),
    ("RMSNorm", True, torch.bfloat16, 2**-7, 2**-6),
]


@pytest.mark.parametrize("kind, centred, dtype, y_error, grad_error", CASES)
def test_formula(kind, centred, dtype, y_error, grad_error):
    norm = made(kind, centred, dtype, eps=1e-3)
    torch.manual_seed(2)
    x = (3 * torch.randn(7, 5, H) + 1).to(dtype).requires_grad_()
    y = norm(x)
    assert y.dtype == dtype
    assert error(y, formula(norm, x, 1e-3)) < y_error

    direction = torch.randn(7, 5, H).to(dtype)
    parameters = [p for p in (norm.weight, norm.bias) if p is not None]
    found = torch.autograd.grad(y, [x, *parameters], direction)
    expected = torch.autograd.grad(formula(norm, x, 1e-3), [x, *parameters], direction.double())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert error(one, other) < grad_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("traced", [False, True])
def test_rms_norm_is_torchs_to_the_bit(dtype, traced, monkeypatch):
    """And so are its gradients, up to the order of sums."""
    if traced:
        monkeypatch.setattr(fused_layer_norm, "TRACED_DEVICES", frozenset({"cpu"}))
    norm = made("RMSNorm", False, dtype)
    x = (3 * torch.randn(7, 5, H) + 1).to(dtype).requires_grad_()
    direction = torch.randn(7, 5, H).to(dtype)
    theirs = F.rms_norm(x, (H,), norm.weight, 1e-5)
    ours = norm(x)
    assert torch.equal(ours, theirs)
    found, expected = (torch.autograd.grad(y, [x, norm.weight], direction) for y in (ours, theirs))
    limit = {torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]
    assert max(map(error, found, expected)) < limit


def test_rms_norm_has_the_gradients_of_its_differences():
    x, weight = (torch.randn(*shape, H, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), ()))
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-3), (x, weight))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_keeps_its_input_and_numbers_of_a_row(kind, dtype):
    norm, x = made(kind, False, dtype), torch.randn(7, 5, H).to(dtype).requires_grad_()
    with SavedBytes(norm.parameters()) as saved:
        y = norm(x)
    assert y.requires_grad
    assert x.nbytes < saved.bytes <= x.nbytes + 7 * 5 * 2 * 4
    with SavedBytes(norm.parameters()) as torchs:
        theirs = F.rms_norm(x, (H,), norm.weight)
    assert theirs.requires_grad
    assert torchs.bytes > 1.9 * x.nbytes  # what the limit above would catch


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_eps_counts(kind):
    small = torch.full((1, 1, H), 1e-4)
    small[..., ::2] *= -1
    assert error(made(kind, False, torch.float32, 1e-3)(small), made(kind, False, torch.float32, 1e-8)(small)) > 0.5


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_under_autocast_the_result_has_its_dtype(kind):
    norm = made(kind, False, torch.float32)
    x = torch.randn(3, 2, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
        half = norm(x.bfloat16())
    assert y.dtype == half.dtype == torch.bfloat16
    assert error(y, formula(norm, x, 1e-5)) < 2**-8  # computed in float32, rounded once
    assert error(half, formula(norm, x.bfloat16(), 1e-5)) < 2**-7
    assert norm(x).dtype == torch.float32


def test_starts_as_the_identity():
    for kind in ("LayerNorm", "RMSNorm"):
        for centred in (False, True):
            norm = Norm(config(kind, centred), H)
            assert norm.weight.tolist() == [0.0 if centred else 1.0] * H
            assert (norm.bias is None) == (kind == "RMSNorm")
            if norm.bias is not None:
                assert norm.bias.tolist() == [0.0] * H


@pytest.mark.parametrize("mark", [True, False])
def test_parameters_carry_the_sequence_parallel_mark(mark):
    norm = Norm(config("LayerNorm", sequence_parallel=mark), H)
    assert [param.sequence_parallel for param in norm.parameters()] == [mark, mark]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_of_params_dtype(dtype):
    norm = Norm(config("LayerNorm", params_dtype=dtype), H)
    assert {param.dtype for param in norm.parameters()} == {dtype}


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="normalization='BatchNorm'"):
        Norm(config("BatchNorm"), H)


def against_upstream() -> dict[str, float]:
    """Errors against the norms that upstream's local specs name, with the same parameters."""
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    x = 2 * torch.randn(6, 2, H) + 0.5
    errors = {}
    for kind in ("LayerNorm", "RMSNorm"):
        for stock, centred in ((WrappedTorchNorm, False), (FusedLayerNorm, True)):
            if stock is FusedLayerNorm and kind == "RMSNorm":
                continue  # upstream's has LayerNorm only
            ours, theirs = made(kind, centred, torch.float32), stock(config(kind, centred), H, eps=1e-5)
            theirs.load_state_dict(ours.state_dict())  # strict: the same names
            errors[f"{kind} {stock.__name__}"] = error(ours(x), theirs(x))
    return errors


@pytest.mark.ranks
def test_upstream_gives_the_same_numbers(active):
    errors = active(against_upstream)
    assert len(errors) == 3
    assert max(errors.values()) < 5e-7, errors
