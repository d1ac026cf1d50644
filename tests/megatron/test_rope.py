"""Position embeddings: apply_rope_fusion against megatron-core's own code without, to the bit; frequencies against
Hugging Face's; rotations against complex numbers; learned positions against a sum of rows.
"""

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


# --- frequencies, against Hugging Face ------------------------------------------------------------------------------

Kind = dict[str, Any]
# name: keyword arguments of our side, those of the reference (rope_scaling), features a head
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 40.0}
FREQUENCIES: dict[str, tuple[Kind, Kind, int]] = {
    "plain": ({}, {"rope_type": "default"}, 64),
    "another base": ({"rotary_base": 500000}, {"rope_type": "default"}, 128),
    "partial": ({"rotary_percent": 0.25}, {"rope_type": "default"}, 80),
    "interpolated": ({"seq_len_interpolation_factor": 4.0}, {"rope_type": "linear", "factor": 4.0}, 64),
    "Llama 3.1": ({"rotary_base": 500000, "rope_scaling": True}, {**LLAMA3, "factor": 8.0}, 128),
    "Llama 3.2": (
        {"rotary_base": 500000, "rope_scaling": True, "rope_scaling_factor": 32.0},
        {**LLAMA3, "factor": 32.0},
        64,
    ),
    "YaRN": ({"scaling_factor": 40.0, "original_max_position_embeddings": 4096}, YARN, 64),
    "YaRN, another base and band": (
        {
            "scaling_factor": 40.0,
            "original_max_position_embeddings": 4096,
            "rotary_base": 150000.0,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        128,
    ),
    "YaRN, DeepSeek": (
        {"scaling_factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.707},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707},
        64,
    ),
    "YaRN, not longer": (
        {"scaling_factor": 1.0, "original_max_position_embeddings": 4096},
        {**YARN, "factor": 1.0},
        64,
    ),
}


def frequencies(ours: Kind, dim: int) -> tuple[torch.Tensor, float]:
    """The angle a position [rotated / 2] and what cosine and sine are multiplied with."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    if "scaling_factor" in ours:
        angles, scale = YarnRotaryEmbedding(dim, **ours)(2)
    else:
        given = {"rotary_percent": 1.0, "use_cpu_initialization": True, **ours}
        angles, scale = RotaryEmbedding(dim, cp_group=alone(), **given)(2), 1.0
    assert not angles[0].any()
    first, second = angles[1, 0, 0].chunk(2)
    assert torch.equal(first, second)
    return first, scale


def published(ours: Kind, theirs: Kind, dim: int) -> tuple[torch.Tensor, float]:
    """transformers.modeling_rope_utils' answer for the same model."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = SimpleNamespace(
        rope_theta=ours.get("rotary_base", 10000),
        head_dim=dim,
        hidden_size=dim,
        num_attention_heads=1,
        partial_rotary_factor=ours.get("rotary_percent", 1.0),
        max_position_embeddings=4096,
        rope_scaling=theirs,
    )
    found, scale = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](model, torch.device("cpu"))
    return found, scale


def apart(name: str, change: Kind | None = None) -> tuple[float, float]:
    """The largest relative difference of a frequency, and the difference of the scales."""
    ours, theirs, dim = FREQUENCIES[name]
    mine, scale = frequencies(ours | (change or {}), dim)
    other, published_scale = published(ours, theirs, dim)
    assert mine.shape == other.shape
    return float(((mine - other) / other).abs().max()), abs(scale - published_scale)


@pytest.mark.parametrize("name", FREQUENCIES)
def test_frequencies_are_the_published_ones(name: str, active: Callable[..., Any]) -> None:
    """float32: a unit in the last place or two, 2^-23 each."""
    frequency, scale = active(apart, name)
    assert frequency <= 2**-22 and scale <= 1e-12, (frequency, scale)


MISTAKES: list[tuple[str, Kind]] = [
    ("plain", {"rotary_base": 10001}),
    ("interpolated", {"seq_len_interpolation_factor": 4.001}),
    ("Llama 3.1", {"rope_scaling": False}),
    ("Llama 3.2", {"rope_scaling_factor": 32.1}),
    ("YaRN", {"scaling_factor": 40.1}),
    ("YaRN, another base and band", {"beta_slow": 1.0}),
]


@pytest.mark.parametrize(("name", "change"), MISTAKES)
def test_another_frequency_would_be_seen(name: str, change: Kind, active: Callable[..., Any]) -> None:
    assert active(apart, name, change)[0] > 1e-6


# --- rotations, against complex numbers -----------------------------------------------------------------------------


def rotation(rotated: int, interleaved: bool, latent: bool, fused: bool, scale: float) -> list[torch.Tensor]:
    """Value and gradient of apply_rotary_pos_emb in float64, then those of the formula.

    The pair (x, y) is the number x + iy, and turns by e^(i angle); its gradient turns back.
    """
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    torch.manual_seed(5)
    t = torch.randn(S, B, HEADS, D, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(t)
    freqs = angles(rotated, interleaved).double()
    setting = config(fused, interleaved)
    setting.multi_latent_attention = latent
    found = apply_rotary_pos_emb(t, freqs, setting, mscale=scale, cp_group=alone())
    (gradient,) = torch.autograd.grad(found, t, direction)

    def turn(x: torch.Tensor, sense: int, taken: str, put: str) -> torch.Tensor:
        half = rotated // 2
        places = {
            "halves": (slice(0, half), slice(half, rotated)),
            "pairs": (slice(0, rotated, 2), slice(1, rotated, 2)),
        }
        left, right = places[taken]
        angle = freqs[..., :half] if not interleaved else freqs[..., ::2]
        turned = torch.complex(x[..., left], x[..., right]) * torch.polar(torch.full_like(angle, scale), sense * angle)
        result = x.clone()
        result[..., places[put][0]], result[..., places[put][1]] = turned.real, turned.imag
        return result

    before = "pairs" if interleaved or latent else "halves"  # latent attention takes pairs and leaves halves
    after = "pairs" if interleaved else "halves"
    return [found.detach(), gradient, turn(t.detach(), 1, before, after), turn(direction, -1, after, before)]


ROTATIONS = [  # rotated features of 16, interleaved, latent attention, fused, scale
    (16, False, False, False, 1.0),
    (16, False, False, True, 1.0),
    (4, False, False, True, 1.0),
    (16, True, False, False, 1.0),
    (16, True, False, True, 1.0),
    (4, True, False, True, 1.0),
    (4, True, False, False, 1.0),
    (16, False, True, False, 1.37),
    (8, False, True, False, 1.37),
]


@pytest.mark.parametrize("case", ROTATIONS)
def test_a_rotation_is_a_product_of_complex_numbers(case: Any, active: Callable[..., Any]) -> None:
    value, gradient, expected, expected_gradient = active(rotation, *case)
    assert float((value - expected).abs().max()) <= 1e-14
    assert float((gradient - expected_gradient).abs().max()) <= 1e-14
    assert float((value - expected_gradient).abs().max()) > 0.1  # a turn the other way round is not the same


# --- learned positions, and types that are not there ----------------------------------------------------------------


def learned() -> list[torch.Tensor]:
    """Embedded tokens and the gradients of both tables; the same as a sum of rows."""
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.transformer import TransformerConfig

    from nxdt_nemo.testing.ours import _model_parallel, forget_groups
    from nxdt_nemo.testing.recipe import Layout, Recipe

    state = _model_parallel(Recipe.of("gpt"), Layout())
    made = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, hidden_dropout=0.0)
    table = LanguageModelEmbedding(made, 32, 12, "learned_absolute")
    torch.manual_seed(1)
    tokens, positions = torch.randint(0, 32, (B, S)), torch.arange(S).flip(0).expand(B, S)
    words, places = table.word_embeddings.weight, table.position_embeddings.weight
    ours, plain = table(tokens, positions), (words[tokens] + places[positions]).transpose(0, 1)
    direction = torch.randn_like(plain)
    found = [torch.autograd.grad(one, (words, places), direction) for one in (ours, plain)]
    state.destroy_model_parallel()
    forget_groups()
    return [ours.detach(), *found[0], plain.detach(), *found[1]]


def test_learned_positions_are_added(active: Callable[..., Any]) -> None:
    found = active(learned)
    for mine, plain in zip(found[:3], found[3:], strict=True):
        assert float((mine - plain).abs().max()) <= 1e-6 * float(plain.abs().max())
    assert found[2].abs().sum() > 0
