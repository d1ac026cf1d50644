"""BERT with its pretraining heads: normalised after each sublayer (Hugging Face's `bert`) or before (`megatron-bert`).

Room checkpoint/ (leaf). Megatron's layer is the same in both cases: a norm, attention, a norm, the MLP. Read with
`apply_residual_connection_post_layernorm`, its first norm is the one that Hugging Face has at the end of the layer
before (of the embeddings, for layer 0), its second the one after attention, and the final norm the last layer's.
May import this room. Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nxdt_nemo.checkpoint.families.family import Config, Family, need
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Row, Same

__all__ = ["FAMILY"]

_LAYER, _HF = "layers.{l}.", "bert.encoder.layer.{l}."
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "openai_gelu", "relu": "relu"}


def _after(model: Model, layout: Layout) -> bool:
    return model.norm_after


def _before(model: Model, layout: Layout) -> bool:
    return not model.norm_after


def _pooled(model: Model, layout: Layout) -> bool:
    return model.pooled


def _rows() -> Iterator[Row]:
    for ours, theirs in (("word", "word"), ("position", "position"), ("token_type", "token_type")):
        yield Row(f"bert.embeddings.{theirs}_embeddings.weight", Same(f"embedding.{ours}.weight"), on="first")
    for what in ("weight", "bias"):
        norm, mlp = Same(_LAYER + f"attention.norm.{what}"), Same(_LAYER + f"mlp.norm.{what}")
        zero = f"bert.embeddings.LayerNorm.{what}"
        yield Row(f"bert.encoder.layer.{{before}}.output.LayerNorm.{what}", norm, zero=zero, when=_after)
        yield Row(_HF + f"attention.ln.{what}", norm, when=_before)
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
            yield Row(_HF + f"attention.self.{theirs}.{what}", Same(_LAYER + f"attention.{ours}.{what}"))
        yield Row(_HF + f"attention.output.dense.{what}", Same(_LAYER + f"attention.out.{what}"))
        yield Row(_HF + f"attention.output.LayerNorm.{what}", mlp, when=_after)
        yield Row(_HF + f"ln.{what}", mlp, when=_before)
        yield Row(_HF + f"intermediate.dense.{what}", Same(_LAYER + f"mlp.up.{what}"))
        yield Row(_HF + f"output.dense.{what}", Same(_LAYER + f"mlp.down.{what}"))
        final = Same(f"final_norm.{what}")
        yield Row(f"bert.encoder.layer.{{last}}.output.LayerNorm.{what}", final, on="last", when=_after)
        yield Row(f"bert.encoder.ln.{what}", final, on="last", when=_before)
        head = "cls.predictions.transform."
        yield Row(head + f"dense.{what}", Same(f"head.dense.{what}"), on="last")
        yield Row(head + f"LayerNorm.{what}", Same(f"head.norm.{what}"), on="last")
        yield Row(f"bert.pooler.dense.{what}", Same(f"pooler.{what}"), on="last", when=_pooled)
        yield Row(f"cls.seq_relationship.{what}", Same(f"binary_head.{what}"), on="last", when=_pooled)
    yield Row("cls.predictions.bias", Same("head.bias"), also=("cls.predictions.decoder.bias",), on="last")


_READ = frozenset(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "max_position_embeddings layer_norm_eps hidden_act type_vocab_size tie_word_embeddings torch_dtype "
    "transformers_version".split()
)


def _from_hf(config: Config) -> Model:
    hidden, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    activation: Any = _ACTIVATIONS[str(config.get("hidden_act", "gelu"))]
    return Model(
        family="bert",
        layers=need(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        groups=heads,
        head_size=hidden // heads,
        ffn=need(config, "intermediate_size"),
        vocab=need(config, "vocab_size"),
        positions=need(config, "max_position_embeddings"),
        tied=True,
        norm="LayerNorm",
        norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        norm_after=config.get("model_type") == "bert",
        activation=activation,
        bias=True,
        qkv_bias=True,
        learned_positions=True,
        token_types=config.get("type_vocab_size") or 2,
        pooled="ForPreTraining" in str((config.get("architectures") or ["ForPreTraining"])[0]),
        extra={key: value for key, value in config.items() if key not in _READ},
    )


def _to_hf(model: Model) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    kind = "Bert" if model.norm_after else "MegatronBert"
    return {
        "architectures": [kind + ("ForPreTraining" if model.pooled else "ForMaskedLM")],
        "model_type": "bert" if model.norm_after else "megatron-bert",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.positions,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": names[model.activation],
        "type_vocab_size": model.token_types,
        **model.extra,
    }


def _is_it(model: Model) -> bool:
    return model.token_types > 0


FAMILY = Family(
    "bert",
    ("bert", "megatron-bert"),
    tuple(_rows()),
    _from_hf,
    _to_hf,
    _is_it,
    ignored=(r"(.*\.)?position_ids", r"cls\.predictions\.(decoder\.)?bias"),
)
