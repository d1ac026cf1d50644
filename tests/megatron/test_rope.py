"""Rotary embeddings with apply_rope_fusion against megatron-core's own without: forward and gradient, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nxdt_nemo.errors import NotOnNeuron

S, B, HEADS, D = 11, 2, 3, 16
LENGTHS = [4, 1, 6]


def config(fused: bool, interleaved: bool) -> SimpleNamespace:
    """What apply_rotary_pos_emb reads of a TransformerConfig."""
    return SimpleNamespace(
        apply_rope_fusion=fused, rotary_interleaved=interleaved, multi_latent_attention=False, mrope_section=None
    )


def alone() -> SimpleNamespace:
    """A context-parallel group of one rank."""
    return SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def angles(rotated: int, interleaved: bool) -> torch.Tensor:
    """As megatron-core makes them, [S, 1, 1, rotated]."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    made = RotaryEmbedding(
        D, rotated / D, rotary_interleaved=interleaved, use_cpu_initialization=True, cp_group=alone()
    )
    return made(S)


def turned(
    fused: bool, rotated: int, interleaved: bool, packed: bool, dtype: str, mistake: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotated tensor, and the gradient of what was put in. `mistake` is added to all angles."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    torch.manual_seed(3)
    t = torch.randn((S, HEADS, D) if packed else (S, B, HEADS, D)).to(getattr(torch, dtype)).requires_grad_()
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32) if packed else None
    freqs = angles(rotated, interleaved) + mistake
    found = apply_rotary_pos_emb(t, freqs, config(fused, interleaved), cu_seqlens=ends, cp_group=alone())
    found.backward(torch.randn(found.shape).to(found.dtype))
    assert t.grad is not None
    return found.detach(), t.grad


def both(*case: Any, mistake: float = 0.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [turned(True, *case, mistake), turned(False, *case, 0.0)]


def a_config() -> tuple[bool, bool]:
    """Two settings of a TransformerConfig that asks for the fusion."""
    from megatron.core.transformer import TransformerConfig

    made = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, apply_rope_fusion=True)
    return made.apply_rope_fusion, made.rotary_interleaved


def in_context_parallel() -> str:
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb_thd

    with pytest.raises(NotOnNeuron) as caught:
        fused_apply_rotary_pos_emb_thd(torch.zeros(2, 1, 4), torch.tensor([0, 4]), torch.zeros(4, 1, 1, 4), cp_size=2)
    return str(caught.value)


CASES = [  # rotated features of 16, interleaved, packed sequences
    (16, False, False),
    (8, False, False),
    (16, True, False),
    (8, True, False),
    (16, False, True),
    (8, False, True),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rotated, interleaved, packed", CASES)
def test_equal_to_upstream_without_fusion(
    rotated: int, interleaved: bool, packed: bool, dtype: str, active: Callable[..., Any]
) -> None:
    ours, theirs = active(both, rotated, interleaved, packed, dtype)
    for name, mine, other in zip(("value", "gradient"), ours, theirs, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert torch.equal(mine, other), name


def wrong_by_little() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return both(16, False, False, "float32", mistake=1e-5)


def test_the_comparison_can_fail(active: Callable[..., Any]) -> None:
    ours, theirs = active(wrong_by_little)
    assert not any(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_interleaved_is_another_rotation(active: Callable[..., Any]) -> None:
    pairs, _ = active(both, 16, True, False, "float32")
    halves, _ = active(both, 16, False, False, "float32")
    assert not torch.allclose(pairs[0], halves[0], atol=1e-2)


def test_a_config_that_asks_for_the_fusion_is_made_and_stays_as_it_is(active: Callable[..., Any]) -> None:
    assert active(a_config) == (True, False)


def test_packed_sequences_with_context_parallelism_are_refused(active: Callable[..., Any]) -> None:
    assert "context parallelism" in active(in_context_parallel)
