"""NeMo 2.0's own import, io.load_context and export, on what a test laid out: `nemo2.py WORK FAMILY...`.

WORK/FAMILY has hf/ and ours/, a NeMo 2.0 folder. Writes theirs/, what llm.import_ckpt makes of hf/, hf_again/, what
llm.export_ckpt makes of ours/, and differs.json: fields of both configurations by name, where they differ.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import nxdt_nemo

nxdt_nemo.activate()

from nemo.collections import llm  # noqa: E402
from nemo.lightning import io  # noqa: E402

MODELS = {"llama": llm.LlamaModel, "mistral": llm.MistralModel, "qwen2": llm.Qwen2Model, "gemma": llm.GemmaModel}
MODELS |= {"mixtral": llm.MixtralModel, "qwen3": llm.Qwen3Model}


def fields(folder: Path) -> dict[str, Any]:
    context = io.load_context(folder / "context")
    words = context.model.tokenizer.text_to_ids("a loss of the first step")
    found = {
        field.name: getattr(context.model.config, field.name) for field in dataclasses.fields(context.model.config)
    }
    return {**found, "tokens": words, "model": type(context.model).__name__}


def main(work: Path, family: str) -> None:
    config = llm.GPTConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    llm.import_ckpt(MODELS[family](config), f"hf://{work / 'hf'}", output_path=work / "theirs")
    ours, theirs = fields(work / "ours"), fields(work / "theirs")
    pairs = {key: (ours.get(key), value) for key, value in theirs.items()}
    differ = {key: list(map(repr, pair)) for key, pair in pairs.items() if pair[0] != pair[1]}
    differ = {key: pair for key, pair in differ.items() if pair[0] != pair[1]}  # equal functions are not the same
    (work / "differs.json").write_text(json.dumps(differ))
    llm.export_ckpt(work / "ours", "hf", output_path=work / "hf_again")


if __name__ == "__main__":
    for name in sys.argv[2:]:
        main(Path(sys.argv[1]) / name, name)
