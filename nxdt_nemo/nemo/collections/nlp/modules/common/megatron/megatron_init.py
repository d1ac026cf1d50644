"""Ranks and process groups up before the model is built.

Room nemo/. Wraps nemo.collections.nlp.modules.common.megatron.megatron_init.initialize_model_parallel_for_nemo.
megatron-core 0.13 layers take their process groups at construction; stock NeMo joins them in trainer.fit,
after the model exists, and its layers are left with none. Proof: tests/nemo/test_launch.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from nxdt_nemo.errors import ConfigError
from nxdt_nemo.lightning.strategy import newest_strategy

__all__ = ["initialize_model_parallel_for_nemo"]

# Set by upstream's checkpoint converters, which pretend to be each rank in turn.
PRETENDED_RANKS = "NEMO_MEGATRON_MODEL_PARALLEL_APPSTATE_OVERRIDE"

SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def initialize_model_parallel_for_nemo(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """The ranks, upstream's bookkeeping, then the real groups, by way of the Trainer's strategy.

    Raises ConfigError for a size below 1: megatron_gpt_eval.py's configuration has -1, which NeMo takes from the
    checkpoint of a legacy model only.
    """
    for name in SIZES:
        if (size := kwargs.get(name)) is not None and size < 1:
            raise ConfigError(f"{size} ranks cannot share a model", place=name, fix="say how many should")
    pretended = os.environ.get(PRETENDED_RANKS, "false").lower() == "true"
    strategy = None if pretended else newest_strategy()
    if strategy is not None:
        strategy.start_ranks(kwargs["global_rank"], kwargs["world_size"])
    original(*args, **kwargs)
    if strategy is not None:
        strategy.bring_up_ranks()
