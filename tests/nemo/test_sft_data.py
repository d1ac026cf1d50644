"""Tuning by `nxdt-nemo run --config`: packed sequences as unpacked ones, chat, and what LoRA saves, against peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nxdt_nemo._resources import folder as resource
from nxdt_nemo.checkpoint import adapters, formats
from nxdt_nemo.checkpoint.formats.base import Options
from nxdt_nemo.testing.script_run import Run, run

from .conftest import hugging_face_llama

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

PAIRS = [
    {"input": "the sum of one and two", "output": "three"},
    {"input": "a list", "output": "an ordered collection of objects"},
    {"input": "the value that is returned by a function without a return statement", "output": "None"},
    {"input": "class", "output": "a template for objects"},
]
TP2 = ["trainer.devices=2", "model.tensor_model_parallel_size=2"]
PP2 = ["trainer.devices=2", "model.tensor_model_parallel_size=1", "model.pipeline_model_parallel_size=2"]
ONE = ["trainer.devices=1", "model.tensor_model_parallel_size=1"]
LAYOUTS = {"one": ONE, "tp2": TP2, "tp2sp": [*TP2, "model.sequence_parallel=true"], "pp2": PP2}
STEPS = 4
Started = Callable[..., Run]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Llama as transformers writes it; pairs.jsonl, chat.jsonl and packed.npy beside it."""
    import numpy as np
    import sentencepiece

    folder = tmp_path_factory.mktemp("base")
    hugging_face_llama(folder / "hf", seed=11, length=64, initializer_range=0.1)
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in PAIRS))
    chats = [
        {
            "system": "Answer.",
            "mask": "User",
            "conversations": [
                {"from": "User", "value": pair["input"]},
                {"from": "Assistant", "value": pair["output"]},
            ],
        }
        for pair in PAIRS
    ]
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer.model"))
    packed: dict[str, list[Any]] = {"input_ids": [], "loss_mask": [], "seq_start_id": []}
    for pair in PAIRS:  # the format of NeMo's prepare_packed_ft_dataset.py
        question, answer = pieces.encode(pair["input"]), [*pieces.encode(pair["output"]), pieces.eos_id()]
        packed["seq_start_id"].append(len(packed["input_ids"]))
        packed["input_ids"] += question + answer
        packed["loss_mask"] += [False] * (len(question) - 1) + [True] * len(answer) + [False]
    np.save(folder / "packed.npy", np.array([packed], dtype=object))
    return folder


@pytest.fixture
def started(corpus: Path, base: Path, tmp_path: Path) -> Started:
    """`started("pairs.jsonl", ...)`: all weights of the base are tuned on all pairs at once, in each of the steps."""

    def job(data: str, *overrides: str, name: str = "run", script: Path | None = None, environment: Any = None) -> Run:
        cfg: Any = OmegaConf.load(resource("configs") / "demo_finetune.yaml")
        cfg.model.update({"encoder_seq_length": 64, "micro_batch_size": 4, "global_batch_size": 4})
        cfg.model.make_vocab_size_divisible_by = 64
        cfg.model.peft.peft_scheme = None
        cfg.model.optim.update({"lr": 2e-3})
        cfg.model.optim.sched.update({"warmup_steps": 1, "min_lr": 1e-3})
        cfg.trainer.update({"max_steps": STEPS, "val_check_interval": STEPS})
        cfg.exp_manager.create_checkpoint_callback = False
        cfg.model.restore_from_path = str(base / "hf")
        cfg.model.tokenizer.model = str(corpus / "tokenizer.model")
        cfg.model.data.train_ds.file_names = [str(base / data)]
        cfg.model.data.train_ds.shuffle = False
        cfg.model.data.validation_ds.file_names = [str(base / data.replace("packed.npy", "pairs.jsonl"))]
        cfg.exp_manager.explicit_log_dir = str(tmp_path / name)
        OmegaConf.save(cfg, tmp_path / "tuning.yaml")
        words = [str(tmp_path / "tuning.yaml"), *overrides]
        if script is not None:
            words = [f"--config-path={tmp_path}", "--config-name=tuning", *overrides]
        environment = {"NXDT_NEMO_RUNTIME": "cpu"} | (environment or {})
        done = run(script or Path("--config"), words, tmp_path / name, cwd=tmp_path, environment=environment)
        assert done.code == 0, done.output[-4000:]
        return done

    return job


def losses(done: Run) -> list[float]:
    return [value for _, value in sorted(done.curve().items())]


PACKED = [
    f"{sign}model.data.train_ds.{word}"
    for sign, word in (("++", "packed_sequence=true"), ("", "micro_batch_size=1"), ("", "global_batch_size=1"))
] + ["model.data.train_ds.max_seq_length=64"]


@pytest.mark.parametrize("at", ["one", "tp2sp", "pp2"])
def test_packed_is_unpacked(started: Started, at: str) -> None:
    """One row of four sequences, each blind to the others, its positions its own, against four rows.

    Two steps: later NeMo draws unpacked pairs anew, some of them twice, and packs are whole in each epoch.
    """
    apart, packed = started("pairs.jsonl", *ONE, name="apart"), started("packed.npy", *PACKED, *LAYOUTS[at])
    assert losses(packed)[:2] == pytest.approx(losses(apart)[:2], rel=1e-5)
    assert losses(apart)[1] < losses(apart)[0] - 0.01
    if at == "one":  # a row whose sequences see each other says something else
        seen = started("packed.npy", *PACKED, "++model.data.train_ds.packed_sequence_return_cu_seqlen=false", name="s")
        assert abs(losses(seen)[0] - losses(apart)[0]) > 1e-3


def test_chat_in_two_layouts(started: Started) -> None:
    one, two = (started("chat.jsonl", "model.data.chat=true", *LAYOUTS[at], name=at) for at in ("one", "tp2"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert losses(one)[-1] < losses(one)[0]


@pytest.mark.usefixtures("with_torch_xla")
@pytest.mark.parametrize("kind", ["packed", "lora"])
def test_on_the_xla_lane_two_graphs_serve_all_steps(started: Started, tmp_path: Path, kind: str) -> None:
    """Nothing is compiled after two steps, nothing falls off XLA, and the losses are the cpu lane's."""
    data, more = ("packed.npy", PACKED) if kind == "packed" else ("pairs.jsonl", LORA)
    words = [*ONE, *more, "trainer.max_steps=6", "trainer.val_check_interval=6"]
    script, counts = Path(__file__).with_name("counts_tuning.py"), tmp_path / "counts.json"
    cpu = started(data, *words, name="cpu")
    on_xla = {"NXDT_NEMO_RUNTIME": "xla", "COUNTS": str(counts)}
    xla = started(data, *words, name="xla", script=script, environment=on_xla)
    assert "nxdt_nemo: lane xla" in xla.output
    assert losses(xla) == pytest.approx(losses(cpu), rel=1e-5)
    parts = json.loads(counts.read_text())
    assert len(parts) == 6
    assert [part.get("compiled", 0) for part in parts[2:]] == [0, 0, 0, 0]
    assert not any(number for part in parts[2:] for name, number in part.items() if name.startswith("aten::"))


LORA = ["model.peft.peft_scheme=lora", "model.peft.lora_tuning.adapter_dim=4", "model.peft.lora_tuning.alpha=12"]
SAVES = ["exp_manager.create_checkpoint_callback=true"]


@pytest.mark.parametrize("variant, at", [("canonical", "tp2"), ("nemo", "tp2"), ("canonical", "pp2")])
def test_what_lora_saves_is_the_adapter_alone_and_peft_loads_it(
    started: Started, base: Path, corpus: Path, tmp_path: Path, variant: str, at: str
) -> None:
    import peft
    import sentencepiece
    import transformers

    modules = "[all]" if variant == "canonical" else "[attention,mlp_fc2]"
    kind = [f"model.peft.lora_tuning.variant={variant}", f"model.peft.lora_tuning.target_modules={modules}"]
    done = started("pairs.jsonl", *LORA, *SAVES, *kind, "model.optim.lr=2e-2", *LAYOUTS[at])
    (saved,) = done.folder.rglob("*.nemo")
    source = formats.read(base / "hf", Options())
    found = adapters.read(saved, source)
    assert len(found.pairs) == 2 * (7 if variant == "canonical" else 5)
    adapters.write_peft(found, source, tmp_path / "peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base / "hf")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer.model"))
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    total, count = 0.0, 0
    for pair in PAIRS:
        question, answer = pieces.encode(pair["input"]), [*pieces.encode(pair["output"]), pieces.eos_id()]
        with torch.no_grad():
            logits = tuned(torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    (said,) = [value for step, value in sorted(done.curve("validation_loss").items())][-1:]
    assert total / count == pytest.approx(said, rel=1e-5)
    assert losses(done)[0] - said > 0.05  # which the base would not say

    trained = sum(a.size + b.size for a, b in found.pairs.values())
    whole = sum(parameter.numel() for parameter in model.base_model.parameters())
    for file in done.folder.rglob("*.ckpt"):
        held = torch.load(file, map_location="cpu", weights_only=False)
        assert held["state_dict"]
        assert all("adapter" in name for name in held["state_dict"]), file
        state = held["optimizer_states"][0]
        state = state.get("optimizer", state)["state"]
        size = sum(each["exp_avg"].numel() for each in state.values())
        assert 0 < size <= trained < whole / 2
