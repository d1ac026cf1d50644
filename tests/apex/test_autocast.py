"""Under autocast the norms see autocast's dtype, and their arithmetic is left alone by it."""

from __future__ import annotations

import pytest
import torch

from nxdt_nemo.apex._autocast_utils import _cast_if_autocast_enabled, without_autocast
from nxdt_nemo.apex.contrib.layer_norm.layer_norm import FastLayerNorm
from nxdt_nemo.apex.normalization import FusedLayerNorm, FusedRMSNorm, MixedFusedRMSNorm
from nxdt_nemo.apex.normalization.fused_layer_norm import FusedLayerNormAffineFunction


def test_cast_takes_floating_tensors_only() -> None:
    values = (torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.float64), None, 0.5)
    assert _cast_if_autocast_enabled(*values) == values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = _cast_if_autocast_enabled(*values)
    assert [t.dtype for t in cast[:3]] == [torch.bfloat16, torch.int64, torch.float64]
    assert cast[3:] == (None, 0.5)


def test_other_device_types_are_left_alone() -> None:
    on_meta = torch.ones(2, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _cast_if_autocast_enabled(on_meta)[0] is on_meta
        with without_autocast(on_meta):
            assert torch.is_autocast_enabled("cpu")
        with without_autocast(torch.ones(1)):
            assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("cls", [FusedLayerNorm, FusedRMSNorm, MixedFusedRMSNorm, FastLayerNorm])
def test_norms_return_autocast_dtype(cls: type[torch.nn.Module]) -> None:
    module, x = cls(16), torch.randn(4, 16)
    assert module(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.dtype == torch.float32


def test_the_function_keeps_the_input_dtype() -> None:
    x, weight, bias = torch.randn(4, 16).bfloat16(), torch.ones(16), torch.zeros(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert FusedLayerNormAffineFunction.apply(x, weight, bias, (16,), 1e-5).dtype == torch.bfloat16
        wide = FusedLayerNormAffineFunction.apply(x.float(), weight, bias, (16,), 1e-5)
    assert wide.dtype == torch.float32


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_the_arithmetic_runs_without_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On cpu autocast leaves these ops alone, elsewhere it would widen them: look at the switch, not the result."""
    seen = []
    real = getattr(torch.nn.functional, name)

    def spy(*args: object) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        result: torch.Tensor = real(*args)
        return result

    monkeypatch.setattr(torch.nn.functional, name, spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (FusedLayerNorm if name == "layer_norm" else FusedRMSNorm)(8)(torch.randn(2, 8))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]
