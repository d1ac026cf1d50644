"""What every side of a parity run shares: tiny models of five families, their batches, the learning rate, the layouts.

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

Family = Literal["gpt", "llama", "mixtral", "bert", "t5"]
FAMILIES: tuple[Family, ...] = ("gpt", "llama")  # the two that every table has


@dataclass(frozen=True)
class Recipe:
    """One tiny training run; sizes in tokens, weights in float32 unless dtype says bfloat16.

    micro_batches counts the whole world's micro-batches of a step: d data-parallel ranks take 1/d of them each.
    vocab is the padded size: the same in every layout, or the softmax differs. A Mixtral has experts of ffn size each,
    of which a token sees two; layers of a T5 are its encoder's, and as many its decoder's.
    """

    family: Family = "gpt"
    layers: int = 4
    hidden: int = 64
    heads: int = 8
    kv_groups: int = 8
    ffn: int = 256
    experts: int = 0
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
        Mixtral: a Llama with experts. BERT: a masked GPT that sees both sides, with padding. T5: learned positions,
        an encoder's padded text and its continuation.
        """
        gated = family in ("llama", "mixtral")
        llama = {"kv_groups": 4, "ffn": 176} if gated else {}
        slow = {"lr": 1e-3, "min_lr": 1e-4} if gated or family == "bert" else {}
        own: dict[str, Any] = {"mixtral": {"experts": 4, "ffn": 96}, "t5": {"layers": 2}}.get(family, {})
        return replace(cls(family=family), **{**llama, **slow, **own, **changes})

    @property
    def gated(self) -> bool:
        """SwiGLU, RMSNorm, rotary positions, grouped queries, no biases, an output layer of its own."""
        return self.family in ("llama", "mixtral")

    def lr_at(self, step: int) -> float:
        """NeMo's CosineAnnealing with warm-up, step counted from 0."""
        if step <= self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Batch:
    """One micro-batch, int64.

    tokens   [micro_batch, seq]; a T5's are its encoder's
    labels   [micro_batch, seq], a T5's [micro_batch, seq / 2]
    real     [micro_batch, seq], 0 where a BERT's or a T5's tokens are padding
    decoder  [micro_batch, seq / 2], what a T5's decoder reads
    Models take tensors in the arrays' place.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    real: NDArray[np.int64] | None = None
    decoder: NDArray[np.int64] | None = None


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
    for _ in range(recipe.seq + 1 + (recipe.seq // 2 if recipe.family == "t5" else 0)):
        columns.append(symbols[state] * (recipe.vocab // 64) + state % (recipe.vocab // 64))
        state = successors[state, draw.choice(4, count, p=[0.55, 0.25, 0.15, 0.05])]
    text = np.stack(columns, axis=1).reshape(recipe.micro_batches, recipe.micro_batch, -1)
    cut = {"bert": _masked, "t5": _continued}.get(recipe.family, _shifted)
    return [cut(recipe, block, draw) for block in text]


def _shifted(_: Recipe, text: NDArray[np.int64], __: np.random.Generator) -> Batch:
    """To predict the next token."""
    return Batch(text[:, :-1].copy(), text[:, 1:].copy())


def _masked(recipe: Recipe, text: NDArray[np.int64], draw: np.random.Generator) -> Batch:
    """To predict all tokens, a sixth of which are hidden behind the vocabulary's last one; ends are padded."""
    labels = text[:, :-1].copy()
    hidden = draw.random(labels.shape) < 1 / 6
    return Batch(np.where(hidden, recipe.vocab - 1, labels), labels, _real(recipe, draw))


def _continued(recipe: Recipe, text: NDArray[np.int64], draw: np.random.Generator) -> Batch:
    """To predict what comes after the encoder's text."""
    later = text[:, recipe.seq :]
    return Batch(text[:, : recipe.seq].copy(), later[:, 1:].copy(), _real(recipe, draw), later[:, :-1].copy())


def _real(recipe: Recipe, draw: np.random.Generator) -> NDArray[np.int64]:
    lengths = draw.integers(recipe.seq * 3 // 4, recipe.seq + 1, (recipe.micro_batch, 1))
    return (np.arange(recipe.seq) < lengths).astype(np.int64)


def transformer_fields(recipe: Recipe) -> dict[str, Any]:
    """TransformerConfig's fields that both sides use; activation_func is left to whoever has torch."""
    gated = recipe.gated
    return _experts(recipe) | {
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


def _experts(recipe: Recipe) -> dict[str, Any]:
    """Mixtral's: the two best of all experts, none dropped, softmax over the two, both auxiliary losses."""
    if not recipe.experts:
        return {}
    return {
        "num_moe_experts": recipe.experts,
        "moe_ffn_hidden_size": recipe.ffn,
        "moe_router_topk": 2,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.02,
        "moe_z_loss_coeff": 1e-3,
    }


@dataclass(frozen=True)
class Layout:
    """How the ranks are laid out.

    tp, cp, pp, dp  tensor, context, pipeline and data parallel sizes; the world is their product
    sp              sequence parallelism
    ep, etp         expert parallel size, and the experts' tensor parallel size (0: tp)
    vpp             model chunks a pipeline rank has (0: one, not interleaved)
    first, last     layers in the first and in the last pipeline stage (0: as many as in the others)
    cut             layers of each stage, or chunk, in their order: "1-3"
    account         embedding and loss count as a layer each where layers are dealt out
    zero            ZeRO-1
    grouped         a rank's experts in two parameters, computed together
    static          experts in tensors whose shapes do not depend on the routing
    kv_head_order   where there are more tensor-parallel ranks than KV heads: which of their copies a rank has
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    zero: bool = False
    cp: int = 1
    ep: int = 1
    etp: int = 0
    vpp: int = 0
    first: int = 0
    last: int = 0
    cut: str = ""
    account: bool = False
    kv_head_order: Literal["trn2", "trn1"] = "trn2"
    grouped: bool = False
    static: bool = False

    @property
    def world(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def pipeline_layout(self) -> str | None:
        """`cut` as megatron-core writes it: Et|tttL."""
        return f"E{'|'.join('t' * int(layers) for layers in self.cut.split('-'))}L" if self.cut else None

    @property
    def chunks(self) -> int:
        """Model chunks of one rank."""
        return self.vpp or 1

    def __str__(self) -> str:
        marks = {
            f"tp{self.tp}": self.tp > 1,
            "sp": self.sp,
            f"cp{self.cp}": self.cp > 1,
            f"ep{self.ep}": self.ep > 1,
            f"etp{self.etp}": self.etp > 0,
            f"pp{self.pp}": self.pp > 1,
            f"first{self.first}": self.first > 0,
            f"last{self.last}": self.last > 0,
            f"cut{self.cut}": bool(self.cut),
            "account": self.account,
            f"vpp{self.vpp}": self.vpp > 0,
            f"dp{self.dp}": self.dp > 1,
        }
        sizes = "".join(mark for mark, true in marks.items() if true) or "one"
        order = "" if self.kv_head_order == "trn2" else f" {self.kv_head_order}"
        more = "".join(f"+{mark}" for mark in ("zero", "grouped", "static") if getattr(self, mark))
        return f"{sizes}{more}{order}"


_LAYOUT = re.compile(
    r"(?:one|(?:tp(?P<tp>\d+)(?P<sp>sp)?)?(?:cp(?P<cp>\d+))?(?:ep(?P<ep>\d+))?(?:etp(?P<etp>\d+))?"
    r"(?:pp(?P<pp>\d+)(?:first(?P<first>\d+))?(?:last(?P<last>\d+))?(?:cut(?P<cut>\d+(?:-\d+)+))?"
    r"(?P<account>account)?(?:vpp(?P<vpp>\d+))?)?(?:dp(?P<dp>\d+))?)"
    r"(?P<zero>\+zero)?(?P<grouped>\+grouped)?(?P<static>\+static)?"
)


def layout(text: str) -> Layout:
    """`tp2sp`, `pp2vpp2`, `pp2cut1-3`, `cp2`, `ep2dp2`, `dp2+zero`, `one`, ... as a Layout; else ValueError."""
    found = _LAYOUT.fullmatch(text)
    if not text or text.startswith("+") or found is None:
        raise ValueError(
            f"layout {text!r} is not like tp2, tp2sp, pp2, pp2vpp2, pp2first1, tp2pp2, cp2, ep2dp2, dp2+zero or one"
        )
    given = {name: value for name, value in found.groupdict().items() if value is not None}
    cut = given.pop("cut", "")
    fields: dict[str, Any] = {name: int(value) if value.isdigit() else True for name, value in given.items()}
    return Layout(**fields, cut=cut)
