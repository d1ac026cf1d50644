"""The one norm of this backend: LayerNorm and RMSNorm.

Room megatron/. Stands in for megatron.core.fusions.fused_layer_norm.FusedLayerNorm (CUDA kernels, LayerNorm
only) and megatron.core.transformer.torch_norm.WrappedTorchNorm (refuses sequence parallelism). May import
torch and upstream's configuration; enters by ModuleSpec, no patch. Proof: tests/megatron/test_norm.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nxdt_nemo.apex._kernels.lists import TRACED_DEVICES

__all__ = ["Norm", "normalized"]


def normalized(x: Tensor, weight: Tensor, bias: Tensor | None, config: Any, eps: float) -> Tensor:
    """y of Norm for its parameters; config as Norm's."""
    weight = weight + 1 if config.layernorm_zero_centered_gamma else weight
    if config.normalization == "LayerNorm":
        y = F.layer_norm(x, weight.shape, weight, bias, eps)
    else:
        y = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    # Autocast computes norms in float32 and leaves them so; Apex's kernel gave back the autocast dtype,
    # and the sequence-parallel collectives of the next linear layer want one dtype.
    kind = x.device.type
    return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y


class Norm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, or x / sqrt(mean(x^2) + eps) * weight.

    S sequence, B micro-batch, H hidden, t tensor-parallel size.
      x        [S, B, H]; [S/t, B, H] with sequence parallelism; float32 or bfloat16
      weight   [H]  params_dtype; stored minus one if layernorm_zero_centered_gamma
      bias     [H]  LayerNorm only
      returns  as x; the autocast dtype under autocast
    With sequence parallelism each rank sees S/t rows, so the parameters are marked `sequence_parallel` and
    their gradients are summed over the tensor-parallel ranks by whoever finalizes gradients.
    Raises ValueError for a normalization other than LayerNorm and RMSNorm.
    Papers: Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> None:
        """Upstream's signature; `config` decides, the last three arguments are upstream's leftovers."""
        super().__init__()
        self.config = config
        self.normalization = config.normalization
        if self.normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"normalization={self.normalization!r} is neither 'LayerNorm' nor 'RMSNorm'")
        self.hidden_size = (hidden_size,)
        self.eps = eps
        self.zero_centered_gamma = bool(config.layernorm_zero_centered_gamma)
        dtype = config.params_dtype
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        with_bias = self.normalization == "LayerNorm"
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=dtype)) if with_bias else None
        self.reset_parameters()
        for param in self.parameters():
            param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """The identity's scale and no shift."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return normalized(x, self.weight, self.bias, self.config, self.eps)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, to the bit F.rms_norm's; the gradients are the formula's.

    x        [.., H]  any float dtype; arithmetic is float32, or float64 for float64
    weight   [H]
    Keeps x and one number a row. F.rms_norm on the CPU, where its parts are operations of their own, keeps x in float32
    and x / sqrt(..) besides: in bf16 that is three times x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight).to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        of_weight = (grad * unit).flatten(0, -2).sum(0)
        slope = grad * weight.to(scale.dtype)
        mean = (slope * unit).mean(-1, keepdim=True)
        if slope.device.type in TRACED_DEVICES:  # where writing in place costs time, and spares no memory
            slope = (slope - unit * mean) * scale
        else:
            slope = slope.sub_(unit.mul_(mean)).mul_(scale)
        return slope.to(x.dtype), of_weight.to(weight.dtype), None
