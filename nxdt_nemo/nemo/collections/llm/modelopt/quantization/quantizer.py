"""A model that Model Optimizer has changed is exported by it; without that package there is none.

Room nemo/. Wraps nemo.collections.llm.modelopt.quantization.quantizer.export_hf_checkpoint, which llm.export_ckpt asks
first. Proof: tests/nemo/test_nemo2.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["export_hf_checkpoint"]


def export_hf_checkpoint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As upstream; None, NeMo's own exporter goes on, where modelopt.torch cannot be imported."""
    from nemo.collections.llm.modelopt.quantization import quantizer

    return original(*args, **kwargs) if quantizer.HAVE_MODELOPT else None
