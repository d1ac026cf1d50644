"""The dynamic loss scale with hysteresis.

Room apex/. Stands in for amp_C.update_scale_hysteresis; called by NeMo's GradScaler. Proof: tests/apex/test_amp_C.py.
"""

from __future__ import annotations

import torch

__all__ = ["update_scale_hysteresis"]


def update_scale_hysteresis(
    current_scale: torch.Tensor,
    growth_tracker: torch.Tensor,
    hysteresis_tracker: torch.Tensor,
    found_inf: torch.Tensor,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    hysteresis: int,
) -> torch.Tensor:
    """Update scale (float32), growth and hysteresis tracker (int32) in place; all have one element. Returns the scale.

    An overflow uses up one of `hysteresis` lives; with none left the scale shrinks, and goes on shrinking until
    a clean step restores all lives. After `growth_interval` clean steps in a row the scale grows, if it stays finite.
    """
    overflow = found_inf.reshape(growth_tracker.shape) > 0
    lives = hysteresis_tracker - overflow.reshape(hysteresis_tracker.shape).to(hysteresis_tracker.dtype)
    spent = (lives <= 0).reshape(overflow.shape)
    clean_steps = growth_tracker + 1
    due = clean_steps == growth_interval
    grown = current_scale * growth_factor
    grown = torch.where(grown.isfinite(), grown, current_scale)

    def shaped(condition: torch.Tensor) -> torch.Tensor:
        return condition.reshape(current_scale.shape)

    after_clean = torch.where(shaped(due), grown, current_scale)
    after_overflow = torch.where(shaped(spent), current_scale * backoff_factor, current_scale)
    current_scale.copy_(torch.where(shaped(overflow), after_overflow, after_clean))
    growth_tracker.copy_(torch.where(overflow | due, torch.zeros_like(clean_steps), clean_steps))
    full = torch.full_like(lives, hysteresis)
    hysteresis_tracker.copy_(torch.where(overflow.reshape(lives.shape), lives, full))
    return current_scale
