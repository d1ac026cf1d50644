"""The weight of a mixture of experts' auxiliary losses under context parallelism.

Room megatron/. Wraps megatron.core.pipeline_parallel.schedules.forward_step. A context-parallel rank has a part of the
auxiliary losses' gradients, whose sum is meant, and gradients are averaged over these ranks; upstream makes up for that
in the main loss only, up to 0.13 (Megatron-LM pull request 2217). Proof: tests/megatron/test_layouts.py (cp2ep2).
"""

from __future__ import annotations

from typing import Any

__all__ = ["forward_step"]


def forward_step(upstream: Any, *args: Any, **named: Any) -> Any:
    """Upstream's, and the scale that the auxiliary losses' backward pass reads times the context parallel size."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    found = upstream(*args, **named)
    config = named["config"] if "config" in named else args[6]
    if getattr(config, "num_moe_experts", None) is not None and not config.calculate_per_token_loss:
        size = parallel_state.get_context_parallel_world_size()
        MoEAuxLossAutoScaler.main_loss_backward_scale = MoEAuxLossAutoScaler.main_loss_backward_scale * size
    return found
