"""GPT-2 and GPT-3: learned positions, LayerNorm, GELU, biases, embeddings mostly tied.

Room checkpoint/ (leaf). Hugging Face's linear layers are Conv1D, stored [in, out]; c_attn is [q; k; v].
May import this room. Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nxdt_nemo.checkpoint.families.family import Config, Family, need
from nxdt_nemo.checkpoint.families.llama import untied
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Blocks, How, Row, Same

__all__ = ["FAMILY"]

_ACTIVATIONS = {"gelu_new": "openai_gelu", "gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "openai_gelu"}


def _row(key: str, how: How, **more: Any) -> Row:
    """GPT2LMHeadModel's key; GPT2Model's lacks the prefix."""
    return Row("transformer." + key, how, also=(key,), **more)


def _rows() -> Iterator[Row]:
    layer, hf = "layers.{l}.", "h.{l}."
    yield _row("wte.weight", Same("embedding.word.weight"), on="first")
    yield _row("wpe.weight", Same("embedding.position.weight"), on="first")
    for what in ("weight", "bias"):
        turned = what == "weight"
        fused = [layer + f"attention.{one}.{what}" for one in "qkv"]
        yield _row(hf + f"ln_1.{what}", Same(layer + f"attention.norm.{what}"))
        yield _row(hf + f"attn.c_attn.{what}", Blocks(*fused, turned=turned))
        yield _row(hf + f"attn.c_proj.{what}", Same(layer + f"attention.out.{what}", turned=turned))
        yield _row(hf + f"ln_2.{what}", Same(layer + f"mlp.norm.{what}"))
        yield _row(hf + f"mlp.c_fc.{what}", Same(layer + f"mlp.up.{what}", turned=turned))
        yield _row(hf + f"mlp.c_proj.{what}", Same(layer + f"mlp.down.{what}", turned=turned))
        yield _row(f"ln_f.{what}", Same(f"final_norm.{what}"), on="last")
    yield Row("lm_head.weight", Same("head.weight"), on="last", when=untied)


_READ = frozenset(
    "architectures model_type vocab_size n_embd n_layer n_head n_positions n_inner activation_function torch_dtype "
    "layer_norm_epsilon tie_word_embeddings transformers_version hidden_size".split()
)


def _from_hf(config: Config) -> Model:
    hidden, heads = need(config, "n_embd", "hidden_size"), need(config, "n_head", "num_attention_heads")
    said = str(config.get("activation_function", "gelu_new"))
    activation: Any = _ACTIVATIONS[said]
    return Model(
        family="gpt2",
        layers=need(config, "n_layer", "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        groups=heads,
        head_size=hidden // heads,
        ffn=config.get("n_inner") or 4 * hidden,
        vocab=need(config, "vocab_size"),
        positions=need(config, "n_positions", "n_ctx"),
        tied=bool(config.get("tie_word_embeddings", True)),
        norm="LayerNorm",
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        activation=activation,
        bias=True,
        qkv_bias=True,
        learned_positions=True,
        extra={key: value for key, value in config.items() if key not in _READ},
    )


def _to_hf(model: Model) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab,
        "n_embd": model.hidden,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_positions": model.positions,
        "n_ctx": model.positions,
        "n_inner": model.ffn,
        "activation_function": names[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tied,
        **model.extra,
    }


def _is_it(model: Model) -> bool:
    plain = model.bias and not model.gated and not model.experts and not model.qk_norm and not model.token_types
    return plain and model.learned_positions and model.norm == "LayerNorm" and model.groups == model.heads


FAMILY = Family(
    "gpt2",
    ("gpt2",),
    tuple(_rows()),
    _from_hf,
    _to_hf,
    _is_it,
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
)
