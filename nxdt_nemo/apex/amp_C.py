"""The extension module amp_C: Apex's functions over lists of tensors.

Room apex/. Every function takes `(chunk_size, noop_flag, tensor_lists, ...)` as multi_tensor_applier passes them.
Proof: tests/apex/test_amp_C.py and tests/apex/test_optimizers.py.
"""

# ruff: noqa: N999 (upstream's name)
from __future__ import annotations

from ._kernels.adam import multi_tensor_adam, multi_tensor_adam_capturable
from ._kernels.lamb import multi_tensor_lamb
from ._kernels.loss_scale import update_scale_hysteresis
from ._kernels.scale_norm import (
    multi_tensor_axpby,
    multi_tensor_l2norm,
    multi_tensor_l2norm_scale,
    multi_tensor_scale,
    multi_tensor_unscale_l2norm,
)
from ._kernels.sgd import multi_tensor_sgd

__all__ = [
    "multi_tensor_adam",
    "multi_tensor_adam_capturable",
    "multi_tensor_axpby",
    "multi_tensor_l2norm",
    "multi_tensor_l2norm_scale",
    "multi_tensor_lamb",
    "multi_tensor_scale",
    "multi_tensor_sgd",
    "multi_tensor_unscale_l2norm",
    "update_scale_hysteresis",
]
