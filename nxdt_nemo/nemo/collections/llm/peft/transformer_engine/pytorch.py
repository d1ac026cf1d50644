"""See the package."""

from __future__ import annotations

from typing import Any

from torch import nn

from nxdt_nemo.errors import NotOnNeuron

__all__ = ["Linear"]


class Linear(nn.Module):
    """No layer of ours."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotOnNeuron("transformer_engine.pytorch.Linear needs CUDA")
