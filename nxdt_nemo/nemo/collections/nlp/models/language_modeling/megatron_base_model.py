"""What every Megatron model of NeMo does at construction.

Room nemo/. Stands in for a method of
nemo.collections.nlp.models.language_modeling.megatron_base_model.MegatronBaseModel.
"""

from __future__ import annotations

from typing import Any

__all__ = ["_enable_nvidia_optimizations"]


def _enable_nvidia_optimizations(self: Any) -> None:
    """None to enable: they are switches of nvFuser in NVIDIA's containers."""
