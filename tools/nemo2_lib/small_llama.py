"""The Llamas that are imported, tuned and exported: NeMo's configuration, and the same as transformers writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 176,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 64,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 10000,
}
# What NeMo's gpt_finetuning.py restores (Llama3ConfigCI of its tests).
FIXED = CONFIG | {
    "vocab_size": 50304,
    "num_layers": 2,
    "hidden_size": 768,
    "ffn_hidden_size": 3072,
    "num_attention_heads": 8,
    "num_query_groups": 8,
    "seq_length": 2048,
    "rotary_base": 500000,
}


def write_hugging_face(folder: Path, sizes: Mapping[str, Any] = CONFIG) -> None:
    """Random weights in float32, and a byte-level tokenizer of 1,024 pieces from Python's own documentation."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from nxdt_nemo.testing.script_run import hugging_face_llama

    hugging_face_llama(
        folder,
        seed=1,
        length=sizes["seq_length"],
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_query_groups"],
        rms_norm_eps=sizes["layernorm_epsilon"],
        rope_theta=sizes["rotary_base"],
        initializer_range=sizes["hidden_size"] ** -0.5,
    )
    tokens = ByteLevelBPETokenizer()
    special = ["<s>", "</s>", "<pad>"]
    tokens.train_from_iterator(list(topics.values())[:40], 1024, special_tokens=special, show_progress=False)
    named = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokens._tokenizer, **named).save_pretrained(folder)
