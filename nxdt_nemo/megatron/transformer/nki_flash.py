"""Causal attention through the compiler's NKI flash kernels (neuronxcc.nki.kernels), where they are installed.

Room megatron/. Stands in for the flash attention that megatron-core takes from TransformerEngine. Calls and layouts
follow the kernels' documentation (AWS Neuron SDK, nki.kernels.flash_fwd and flash_attn_bwd), the launch on two cores
of trn2 neuronx-distributed's kernels/flash_attn.py (0.18). NOT RUN: no Trainium, and no neuronxcc, was at hand.
Proof, of layouts and launches against the documented ones and of nothing else: tests/megatron/test_attention_choice.py.
Paper: Dao et al. 2022, arXiv:2205.14135.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nxdt_nemo.config.instances import INSTANCES
from nxdt_nemo.runtime.machine import product_name
from nxdt_nemo.runtime.placement import LNC

__all__ = ["Kernels", "flash_attention", "kernels", "misfit"]

SEQUENCE = 2048
"""The kernels work on tiles of this many keys."""
FEATURES = 128
"""Partitions of a NeuronCore: a head's features lie across them."""


class Kernels(NamedTuple):
    """The two kernels and NKI's language, or why they are not there."""

    forward: Any = None
    backward: Any = None
    missing: str = ""
    language: Any = None


@functools.cache
def kernels() -> Kernels:
    """What this environment has."""
    try:
        import neuronxcc.nki.language as nl
        from neuronxcc.nki.kernels import flash_attn_bwd, flash_fwd
    except ImportError as error:
        return Kernels(missing=f"no NKI kernels ({error})")
    return Kernels(flash_fwd, flash_attn_bwd, language=nl)


def misfit(queries: int, keys: int, features: int, values: int, dtype: torch.dtype) -> str:
    """Why a call does not fit the kernels; "" if it does."""
    if queries != keys or keys % SEQUENCE:
        return f"{queries} queries and {keys} keys are not one multiple of {SEQUENCE}"
    if features != values or features > FEATURES:
        return f"{features} and {values} features a head are not one number up to {FEATURES}"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"{dtype} is neither bfloat16 nor float32"
    return ""


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[B, N, S, D] from query [B, N, S, D] and key, value [B, G, S, D].

    The backward kernel knows no groups, so that keys and values are repeated for both.
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    out: Tensor = _Flash.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return out


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        launch = _launch(kernels().forward, query)
        out, lse = launch(
            _turned(query), _turned(key), value.contiguous(), None,
            softmax_scale=scale, use_causal_mask=True, mixed_precision=True, dropout_p=0.0,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale = scale
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        launch = _launch(kernels().backward, query)
        gradients = launch(
            *(_turned(x) for x in (query, key, value, out, grad)), lse, None,
            use_causal_mask=True, mixed_precision=True, dropout_p=0.0, softmax_scale=ctx.scale,
        )  # fmt: skip
        return (*(_turned(x) for x in gradients), None)


def _launch(kernel: Any, query: Tensor) -> Callable[..., Any]:
    """One instance of the kernel a sample and head; the heads divided among a logical core's physical ones, if they
    can be."""
    samples, heads = query.shape[:2]
    cores = _cores()
    shared = cores > 1 and heads % cores == 0
    launch: Callable[..., Any] = kernel[samples, kernels().language.nc(cores) * (heads // cores) if shared else heads]
    return launch


def _cores() -> int:
    """Physical cores of this rank's logical one: 2 on trn2, if nothing else is said."""
    here = INSTANCES.get(product_name())
    return int(os.environ.get(LNC) or (here.default_lnc if here else 1))


def _turned(x: Tensor) -> Tensor:
    """[B, N, D, S] from [B, N, S, D], or back."""
    return x.transpose(-1, -2).contiguous()
