"""The extension module fused_weight_gradient_mlp_cuda: a weight's gradient, added where gradients add up.

Room apex/. Called by megatron.core.tensor_parallel.layers for `gradient_accumulation_fusion`: the product's result
is not written to a tensor of its own first, which then would be read again. Proof: tests/apex/test_wgrad.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxdt_nemo.runtime.select import current

from ._kernels.lists import TRACED_DEVICES

__all__ = ["wgrad_gemm_accum_fp16", "wgrad_gemm_accum_fp32"]


def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [O, H] += grad_output^T total_input, for [N, O] and [N, H] of one dtype.

    Where that dtype is not main_grad's, the product is rounded to it before it is added, as it is without the fusion.
    """
    gradient, same = grad_output.t(), grad_output.dtype == main_grad.dtype
    if main_grad.device.type in TRACED_DEVICES:
        gradient = current().laid_out(gradient)
        total = torch.addmm(main_grad, gradient, total_input) if same else main_grad + gradient.matmul(total_input)
        main_grad.copy_(total)
    elif same:
        main_grad.addmm_(gradient, total_input)
    else:
        main_grad.add_(gradient.matmul(total_input))


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
