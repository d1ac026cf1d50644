"""Hugging Face's Llama of a recipe, with torch's AdamW: what benchmarks and tests put beside ours.

Room testing/. Imports torch and transformers where they are used. Proof: tests/nemo/test_peft.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nxdt_nemo.testing.recipe import Recipe

__all__ = ["adamw", "llama_config", "llama_weights"]


def llama_config(recipe: Recipe, **named: Any) -> Any:
    """The configuration of transformers; `named` are other keys of it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_groups,
        max_position_embeddings=recipe.seq,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        **named,
    )


def llama_weights(weights: dict[str, Any], recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """megatron-core's weights by the names of Hugging Face."""
    size, heads, groups = recipe.hidden, recipe.heads, recipe.kv_groups
    yield "model.embed_tokens.weight", weights["embedding.word_embeddings.weight"]
    yield "model.norm.weight", weights["decoder.final_layernorm.weight"]
    yield "lm_head.weight", weights["output_layer.weight"]
    per = heads // groups
    for index in range(recipe.layers):
        ours, theirs = f"decoder.layers.{index}.", f"model.layers.{index}."
        qkv = weights[ours + "self_attention.linear_qkv.weight"].view(groups, per + 2, size // heads, size)
        for part, rows in (("q", qkv[:, :per]), ("k", qkv[:, per]), ("v", qkv[:, per + 1])):
            yield f"{theirs}self_attn.{part}_proj.weight", rows.reshape(-1, size)
        yield theirs + "self_attn.o_proj.weight", weights[ours + "self_attention.linear_proj.weight"]
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        yield theirs + "mlp.gate_proj.weight", gate
        yield theirs + "mlp.up_proj.weight", up
        yield theirs + "mlp.down_proj.weight", weights[ours + "mlp.linear_fc2.weight"]
        yield theirs + "input_layernorm.weight", weights[ours + "input_layernorm.weight"]
        yield theirs + "post_attention_layernorm.weight", weights[ours + "pre_mlp_layernorm.weight"]


def adamw(model: Any, recipe: Recipe) -> Any:
    """torch's AdamW: matrices decay, vectors do not."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
