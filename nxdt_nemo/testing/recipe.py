"""What every side of a parity run shares: two tiny models, their batches, the learning rate, the layouts.

Room testing/. Plain data and numpy; imports neither torch nor upstream nor the rest of this package, so that the
stock side stays free of us. Proof: tests/testing/test_recipe.py.

The numbers make errors visible. At stock hyper-parameters (lr 2e-4, 500 warm-up steps) 10 steps barely move the
weights, and Adam with clipping hides any constant factor on the gradients; so here the learning rate is 1e-3 or
2e-3 after 2 warm-up steps, the text can be learned, and gradients are compared before clipping.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["FAMILIES", "Batch", "Layout", "Recipe", "layout", "micro_batches", "transformer_fields"]

Family = Literal["gpt", "llama"]
FAMILIES: tuple[Family, ...] = ("gpt", "llama")


@dataclass(frozen=True)
class Recipe:
    """One tiny training run; sizes in tokens, weights in float32 unless dtype says bfloat16.

    micro_batches counts the whole world's micro-batches of a step: d data-parallel ranks take 1/d of them each.
    vocab is the padded size: the same in every layout, or the softmax differs.
    """

    family: Family = "gpt"
    layers: int = 4
    hidden: int = 64
    heads: int = 8
    kv_groups: int = 8
    ffn: int = 256
    vocab: int = 1024
    seq: int = 32
    micro_batch: int = 2
    micro_batches: int = 4
    steps: int = 20
    lr: float = 2e-3
    min_lr: float = 2e-4
    warmup: int = 2
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    clip: float = 1.0
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 1234

    @classmethod
    def of(cls, family: Family, **changes: Any) -> Recipe:
        """GPT: learned positions, GELU, LayerNorm, biases, tied. Llama: RoPE, SwiGLU, RMSNorm, GQA, untied.

        Llama learns at 1e-3: at 2e-3 its first steps overshoot, and stock megatron-core's own grad norms then move by
        4.8e-6 when the initial weights do by half a unit in the last place; at 1e-3 by 4.6e-7, which 1e-6 can judge.
        """
        if family == "gpt":
            return replace(cls(), **changes)
        return replace(cls(family="llama", kv_groups=4, ffn=176, lr=1e-3, min_lr=1e-4), **changes)

    def lr_at(self, step: int) -> float:
        """NeMo's CosineAnnealing with warm-up, step counted from 0."""
        if step <= self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens and labels [micro_batch, seq], int64."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]


def micro_batches(recipe: Recipe, step: int) -> list[Batch]:
    """The step's micro-batches for the whole world, from the seed alone.

    A chain over 64 symbols spread over the whole vocabulary (so every tensor-parallel shard has some), each with
    four successors of unequal weight: the loss can fall from ln(vocab) to about 1.2.
    """
    shape = np.random.default_rng(recipe.seed)
    symbols = shape.permutation(64)
    successors = shape.integers(0, 64, (64, 4))
    draw = np.random.default_rng((recipe.seed, step))
    count = recipe.micro_batches * recipe.micro_batch
    state = draw.integers(0, 64, count)
    columns = []
    for _ in range(recipe.seq + 1):
        columns.append(symbols[state] * (recipe.vocab // 64) + state % (recipe.vocab // 64))
        state = successors[state, draw.choice(4, count, p=[0.55, 0.25, 0.15, 0.05])]
    text = np.stack(columns, axis=1).reshape(recipe.micro_batches, recipe.micro_batch, recipe.seq + 1)
    return [Batch(block[:, :-1].copy(), block[:, 1:].copy()) for block in text]


def transformer_fields(recipe: Recipe) -> dict[str, Any]:
    """TransformerConfig's fields that both sides use; activation_func is left to whoever has torch."""
    gated = recipe.family == "llama"
    return {
        "num_layers": recipe.layers,
        "hidden_size": recipe.hidden,
        "num_attention_heads": recipe.heads,
        "num_query_groups": recipe.kv_groups,
        "ffn_hidden_size": recipe.ffn,
        "normalization": "RMSNorm" if gated else "LayerNorm",
        "gated_linear_unit": gated,
        "add_bias_linear": not gated,
        "layernorm_epsilon": 1e-5,
        "init_method_std": recipe.init_std,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": True,  # NeMo's default; it also selects GELU's tanh form
        "bias_dropout_fusion": True,
        "use_cpu_initialization": True,
        "attention_softmax_in_fp32": False,
        "apply_query_key_layer_scaling": False,
    }


@dataclass(frozen=True)
class Layout:
    """How the ranks are laid out: tensor x pipeline x data parallel sizes, sequence parallelism, ZeRO-1.

    kv_head_order   where there are more tensor-parallel ranks than KV heads: which of their copies a rank has
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    zero: bool = False
    kv_head_order: Literal["trn2", "trn1"] = "trn2"

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        parts = [f"tp{self.tp}{'sp' if self.sp else ''}", f"pp{self.pp}", f"dp{self.dp}"]
        sizes = "".join(part for part in parts if not part.endswith("1")) or "one"
        order = "" if self.kv_head_order == "trn2" else f" {self.kv_head_order}"
        return f"{sizes}{'+zero' if self.zero else ''}{order}"


def layout(text: str) -> Layout:
    """`tp2sp`, `tp2pp2`, `dp2`, `dp2+zero`, `one`, ... as a Layout. Raises ValueError for anything else."""
    found = re.fullmatch(r"(?:one|(?:tp(\d+)(sp)?)?(?:pp(\d+))?(?:dp(\d+))?)(\+zero)?", text)
    if not text or text == "+zero" or found is None:
        raise ValueError(f"layout {text!r} is not like tp2, tp2sp, pp2, tp2pp2, dp2, dp2+zero or one")
    tp, sp, pp, dp, zero = found.groups()
    return Layout(tp=int(tp or 1), pp=int(pp or 1), dp=int(dp or 1), sp=sp is not None, zero=zero is not None)
