"""An optimizer's settings that ask for TransformerEngine's Adam.

Room megatron/. Wraps one method of megatron.core.optimizer.optimizer_config.
Proof: tests/megatron/test_transformer_engine.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nxdt_nemo import console
from nxdt_nemo.errors import ConfigError

__all__ = ["post_init"]

_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def post_init(original: Callable[[Any], None], self: Any) -> None:
    """OptimizerConfig.__post_init__, for `use_precision_aware_optimizer`, which NeMo's performance scripts set.

    With its states in float32, their default, it is the distributed optimizer's Adam to the bit, in less memory, and
    that is what trains. Raises ConfigError for a narrower dtype.
    """
    if self.use_precision_aware_optimizer:
        for name in _DTYPES:
            if getattr(self, name) != torch.float32:
                reason = f"{getattr(self, name)}, where the optimizer's states are float32"
                raise ConfigError(reason, place=f"OptimizerConfig.{name}", fix="leave it out")
        console.once("use_precision_aware_optimizer is TransformerEngine's; the usual one has the same float32 states")
        self.use_precision_aware_optimizer = False
    original(self)
