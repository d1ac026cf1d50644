"""Everything that runs in a training step runs on tensors without values: one graph serves all steps and ranks.

FakeTensorMode refuses `.item()`, boolean indexing and branches on a value, as a traced XLA graph would pay for them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from nxdt_nemo.apex import amp_C, scaled_masked_softmax_cuda
from nxdt_nemo.apex._kernels import adam as adam_kernels
from nxdt_nemo.apex.contrib.layer_norm.layer_norm import FastLayerNorm
from nxdt_nemo.apex.normalization import FusedLayerNorm, MixedFusedRMSNorm
from nxdt_nemo.apex.optimizers import FusedAdam, FusedLAMB, FusedSGD
from nxdt_nemo.apex.transformer.enums import AttnMaskType
from nxdt_nemo.apex.transformer.functional import FusedScaleMaskSoftmax
from nxdt_nemo.apex.transformer.functional.fused_rope import fused_apply_rotary_pos_emb_thd


def optimize(cls: Callable[..., torch.optim.Optimizer], **settings: object) -> None:
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
    optimizer = cls(params, lr=torch.tensor(1e-3), **settings)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()


def clip() -> None:
    grads, flag = [torch.randn(3), torch.randn(2, 2)], torch.zeros(1, dtype=torch.int)
    norm, _ = amp_C.multi_tensor_l2norm(0, flag, [grads], False)
    amp_C.multi_tensor_scale(0, flag, [grads, grads], torch.clamp(1.0 / norm, max=1.0).squeeze())
    amp_C.multi_tensor_axpby(0, flag, [grads, grads, grads], 1.0, 2.0, -1)


def scale_loss() -> None:
    growth, lives = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    amp_C.update_scale_hysteresis(torch.ones(1), growth, lives, torch.ones(1), 2.0, 0.5, 100, 2)


def normalize() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    for module in (FusedLayerNorm(8), MixedFusedRMSNorm(8), FastLayerNorm(8)):
        module(x).sum().backward()


def hide(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(mask, -1e4)


def attend() -> None:
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    module = FusedScaleMaskSoftmax(False, False, AttnMaskType.causal, True, hide, True, 0.5)
    module(x, None).sum().backward()
    y = scaled_masked_softmax_cuda.forward(x.detach(), torch.zeros(1, 1, 4, 4, dtype=torch.bool), 0.5)
    scaled_masked_softmax_cuda.backward(y, y, 0.5)
    cu_seqlens = torch.tensor([0, 2, 4])
    fused_apply_rotary_pos_emb_thd(torch.randn(4, 2, 8), cu_seqlens, torch.randn(4, 1, 1, 8))


STEPS: dict[str, Callable[[], None]] = {
    "adam": lambda: optimize(FusedAdam, weight_decay=0.1),
    "adam capturable": lambda: optimize(FusedAdam, capturable=True),
    "lamb": lambda: optimize(FusedLAMB),
    "sgd": lambda: optimize(FusedSGD, momentum=0.9),
    "clip": clip,
    "loss scale": scale_loss,
    "norms": normalize,
    "attention": attend,
}


@pytest.mark.parametrize("name", STEPS)
def test_no_value_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_kernels, "_ONE_PASS_DEVICES", frozenset())
    with FakeTensorMode():
        STEPS[name]()


def test_the_check_sees_a_value_that_is_read() -> None:
    with FakeTensorMode():
        x = torch.randn(3)
        with pytest.raises(DataDependentOutputException):
            bool(x.sum() > 0)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            x[x > 0]
