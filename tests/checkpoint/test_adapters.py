"""LoRA adapters against Hugging Face's `peft`: what it wrote is merged as it merges, what we write it loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nxdt_nemo.checkpoint import adapters, formats
from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Options
from nxdt_nemo.errors import UserError

from .test_cli import run

RANK, ALPHA = 4, 12
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HFModel = Callable[[str], Path]


def by_peft(base: Path, folder: Path, targets: list[str], **settings: Any) -> Any:
    """A model of peft's with seeded A and B, saved in `folder`."""
    import peft
    import transformers

    torch.manual_seed(7)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **settings)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(40).reshape(2, 20)).logits
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merged_as_peft_merges(hf_model: HFModel, tmp_path: Path, family: str) -> None:
    import transformers

    base = hf_model(family)
    model = by_peft(base, tmp_path / "adapter", ALL)
    assert run("merge", base, tmp_path / "adapter", tmp_path / "merged") == 0
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    theirs = model.merge_and_unload()
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-6), name
    plain = logits(transformers.AutoModelForCausalLM.from_pretrained(base))
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert (logits(ours) - plain).abs().max() > 1e-2


def nemo_lora(folder: Path, source: Any, given: dict[str, Any], tp: int, pp: int, peft: dict[str, Any]) -> Path:
    """A .nemo's folder of the fused adapters, a file a rank: cut as NeMo's parallel linear layers are."""
    model = source.model
    given = {key: tuple(torch.tensor(matrix) for matrix in pair) for key, pair in given.items()}
    per_stage, groups = model.layers // pp, model.groups // tp
    for stage in range(pp):
        for rank in range(tp):
            held = {}
            for local in range(per_stage):
                layer = f"layers.{local + stage * per_stage}."
                a = {name: given[f"{layer}{name}.weight"][0] for name in ("attention.q", "attention.out", "mlp.gate")}
                b = {
                    key.removeprefix(layer).removesuffix(".weight"): pair[1].chunk(tp)[rank]
                    for key, pair in given.items()
                    if key.startswith(layer)
                }
                fused = [b[f"attention.{letter}"].unflatten(0, (groups, -1)) for letter in "qkv"]
                place = f"model.decoder.layers.{local}."
                attention, mlp = f"{place}self_attention.adapter_layer.", f"{place}mlp.adapter_layer."
                held |= {
                    f"{attention}lora_kqv_adapter.linear_in.weight": a["attention.q"].chunk(tp)[rank],
                    f"{attention}lora_kqv_adapter.linear_out.weight": torch.cat(fused, 1).flatten(0, 1),
                    f"{attention}lora_dense_attention_adapter.linear_in.weight": a["attention.out"].chunk(tp, 1)[rank],
                    f"{attention}lora_dense_attention_adapter.linear_out.weight": b["attention.out"],
                    f"{mlp}lora_hto4h_adapter.linear_in.weight": a["mlp.gate"].chunk(tp)[rank],
                    f"{mlp}lora_hto4h_adapter.linear_out.weight": torch.cat([b["mlp.gate"], b["mlp.up"]]),
                }
            name = (
                ""
                if tp == pp == 1
                else f"mp_rank_{rank:02d}/"
                if pp == 1
                else f"tp_rank_{rank:02d}_pp_rank_{stage:03d}/"
            )
            (folder / name).mkdir(parents=True, exist_ok=True)
            torch.save({key: value.clone() for key, value in held.items()}, folder / f"{name}model_weights.ckpt")
    config = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "peft": peft}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    return folder


LORA = {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": RANK, "alpha": ALPHA, "adapter_dropout": 0.0}}


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (2, 2)])
def test_nemos_adapters_in_any_layout_are_one_folder_that_peft_loads(
    hf_model: HFModel, tmp_path: Path, tp: int, pp: int
) -> None:
    import peft
    import transformers

    base = hf_model("llama")
    source = formats.read(base, Options())
    model = by_peft(base, tmp_path / "theirs", [name for name in ALL if name != "down_proj"])
    given = dict(adapters.read(tmp_path / "theirs", source).pairs)
    for key, (_, b) in list(given.items()):  # q, k and v share A, so do gate and up
        if any(name in key for name in (".k.", ".v.", ".up.")):
            shared = key.replace(".k.", ".q.").replace(".v.", ".q.").replace(".up.", ".gate.")
            given[key] = (given[shared][0], b)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name and any(part in name for part in ("k_proj", "v_proj", "up_proj")):
                other = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
                parameter.copy_(model.get_parameter(other))
    saved = nemo_lora(tmp_path / "lora", source, given, tp, pp, LORA)
    assert run("adapter", base, saved, tmp_path / "peft") == 0
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
    assert torch.equal(logits(loaded), logits(model))
    convert(
        base, tmp_path / "merged", "hf", change=lambda found: adapters.merge_into(found, adapters.read(saved, found))
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)


def test_what_is_no_plain_lora_is_refused(hf_model: HFModel, tmp_path: Path) -> None:
    base = hf_model("llama")
    source = formats.read(base, Options())
    by_peft(base, tmp_path / "adapter", ["q_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(config.read_text())
    for change, words in [({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "not LORA"), ({"r": 8}, "rank 8")]:
        config.write_text(json.dumps(said | change))
        with pytest.raises(UserError, match=words):
            adapters.read(tmp_path / "adapter", source)
    with pytest.raises(UserError, match="is not there"):
        adapters.read(tmp_path / "none", source)
    tied = tmp_path / "ia3"
    tied.mkdir()
    (tied / "model_config.yaml").write_text(yaml.safe_dump({"peft": {"peft_scheme": "ia3"}}))
    with pytest.raises(UserError, match="ia3, not lora"):
        adapters.read(tied, source)
    gpt = formats.read(hf_model("gpt2"), Options())
    name = "layers.0.attention.q.weight"
    with pytest.raises(UserError, match="no linear layer of its own"):
        adapters.write_peft(
            adapters.Adapter(tied, 1, 1.0, 0.0, {name: (np.ones((1, 1), np.float32), np.ones((1, 1), np.float32))}),
            gpt,
            tied,
        )
