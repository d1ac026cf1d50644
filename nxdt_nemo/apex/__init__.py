"""The part of NVIDIA Apex's API that NeMo 2.4.1 and megatron-core 0.13.1 import, in plain torch.

Room apex/. Stands in for the package `apex` and its extension modules (`amp_C`, `scaled_*_softmax_cuda`), under
the same paths, for megatron.*, nemo.* and the user's `__main__` while the backend is active. May import torch and
nxdt_nemo.errors; megatron.core only lazily, where NeMo uses Apex's object as a spare for Megatron's.
Left out on purpose, because upstream's answer to an ImportError is the right one: `apex.contrib.nccl_allocator`,
`fused_weight_gradient_mlp_cuda`, `fused_adan`. What upstream would fail on later, with another error, is here and
raises NotOnNeuron with its name. Proof: tests/apex/test_imported_symbols.py (the whole list).
"""

from __future__ import annotations

import importlib
from types import ModuleType

_SUBPACKAGES = frozenset(
    {"amp", "amp_C", "contrib", "multi_tensor_apply", "normalization", "optimizers", "transformer"}
)


def __getattr__(name: str) -> ModuleType:
    """`apex.optimizers` after a bare `import apex`, as with the real package, but loaded when asked for."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
