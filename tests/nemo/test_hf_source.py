"""Hugging Face style models of NxD Training (`model_source: hf`): sizes of a config.json, weights of its folder, rows
of token ids that `datasets` saved. Against transformers, and in every layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nxdt_nemo.data.arrow import TokenRows
from nxdt_nemo.testing.script_run import Run, run

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

SMALL = Path(__file__).parents[1] / "config" / "migrate" / "data" / "small_hf.yaml"
VOCAB, SEQ, ROWS, BATCH, SEED = 256, 32, 10, 4, 1234
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # else a loss says little of what the layers do
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"rms_norm_eps": 1e-6},
    "qwen3": {"head_dim": 16},
}
LAYOUTS = {
    "tp2": ("distributed_strategy.tensor_model_parallel_size=2", "distributed_strategy.sequence_parallel=True"),
    "pp2": ("distributed_strategy.pipeline_model_parallel_size=2",),
    "dp2": (),
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two lengths, some labels hidden."""
    import datasets

    draw = np.random.default_rng(5)
    rows = [draw.integers(0, VOCAB, SEQ if n % 3 else SEQ - 7).tolist() for n in range(ROWS)]
    labels = [[-100] * (n % 4) + row[n % 4 :] for n, row in enumerate(rows)]
    folder = tmp_path_factory.mktemp("tokens") / "train"
    datasets.Dataset.from_dict({"input_ids": rows, "labels": labels}).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model("qwen3"): a folder of that family as transformers writes it, with random weights."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("models")

    def made(family: str) -> Path:
        if not (folder / family).exists():
            torch.manual_seed(3)
            config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
        return folder / family

    return made


@pytest.fixture
def train(tokens: Path, tmp_path: Path) -> Callable[..., Run]:
    """train(model, "trainer.max_steps=2", ...): `nxdt-nemo run --config small_hf.yaml` in the folder `name`."""

    def job(folder: Path, *words: str, name: str = "run", ranks: int = 1) -> Run:
        given = [
            f"model.model_config={folder / 'config.json'}",
            f"model.restore_from_path={folder}",
            f"data.train_dir={tokens}",
            f"exp_manager.explicit_log_dir={tmp_path / name}",
            f"trainer.devices={ranks}",
            "model.data.num_workers=0",
        ]
        environment = {"NXDT_NEMO_RUNTIME": "cpu"}
        return run(
            Path("--config"), [str(SMALL), *given, *words], tmp_path / name, cwd=tmp_path, environment=environment
        )

    return job


def losses(found: Run) -> list[float]:
    assert found.code == 0, found.output[-3000:]
    return list(found.curve().values())


def by_transformers(folder: Path, tokens: Path, step: int = 0) -> float:
    """A batch's loss, a mean of its micro-batches' means; rows are padded for transformers, at the end."""
    import datasets
    import torch
    import transformers

    rows, order = datasets.load_from_disk(str(tokens)), TokenRows(tokens, SEQ, VOCAB, seed=SEED)
    batch = [rows[order.row_of(sample)] for sample in range(step * BATCH, (step + 1) * BATCH)]
    hugging = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    means = []
    for pair in (batch[:2], batch[2:]):
        ids = torch.tensor([row["input_ids"] + [0] * (SEQ - len(row["input_ids"])) for row in pair])
        labels = torch.tensor([row["labels"] + [-100] * (SEQ - len(row["labels"])) for row in pair])
        with torch.no_grad():
            means.append(float(hugging(input_ids=ids, labels=labels).loss))
    return sum(means) / len(means)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_loss_is_that_of_transformers(train, model, tokens: Path, family: str) -> None:
    found = losses(train(model(family)))
    assert len(found) == 3
    assert found[0] == pytest.approx(by_transformers(model(family), tokens), rel=1e-5)
    assert abs(found[2] - by_transformers(model(family), tokens, step=2)) > 1e-3, "the weights were not trained"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_every_layout_says_the_losses_of_one_rank(train, model, family: str) -> None:
    one = losses(train(model(family)))
    for name, words in LAYOUTS.items():
        assert losses(train(model(family), *words, name=name, ranks=2)) == pytest.approx(one, rel=1e-5), name


def test_other_weights_say_another_loss(train, model, tokens: Path, tmp_path: Path) -> None:
    """What the tests above could not tell from a loss of random weights."""
    import torch
    import transformers

    folder = shutil.copytree(model("llama"), tmp_path / "other")
    hugging = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        hugging.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    hugging.save_pretrained(folder)
    expected = by_transformers(model("llama"), tokens)
    assert abs(losses(train(folder))[0] - expected) > 1e-5 * expected


def test_a_run_goes_on_with_the_rows_that_it_has_not_seen(train, model, tmp_path: Path) -> None:
    """Ten rows, four a step: what is left of a run after two steps begins within an epoch and ends in the next one."""
    steps = ("trainer.max_steps=4", "exp_manager.resume_if_exists=True", "exp_manager.resume_ignore_no_checkpoint=True")
    saves = (
        "exp_manager.create_checkpoint_callback=True",
        "exp_manager.checkpoint_callback_params.save_top_k=2",
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=False",
    )
    whole = losses(train(model("llama"), *steps, *saves, name="whole"))
    (half,) = (at for at in (tmp_path / "whole" / "checkpoints").iterdir() if at.name.endswith("=8.0"))
    resume = f"exp_manager.resume_from_checkpoint='{half}'"
    found = train(model("llama"), *steps, resume, name="rest", ranks=2)
    assert losses(found) == pytest.approx(whole[2:], rel=1e-5)
    assert found.resumed_from == half.name


BAD = [  # overrides, what one line has to say
    (["data.train_dir=/nowhere"], ["model.data.data_prefix.train", "/nowhere", "is no folder"]),
    (["model.encoder_seq_length=16"], ["row 1", "32 tokens, more than 16"]),
    (["model.tokenizer.vocab_size=200"], ["has token", "the model has 200"]),
    (["trainer.limit_val_batches=1"], ["model.data.data_prefix.validation is not set"]),
]


@pytest.mark.parametrize("words, said", BAD, ids=[words[0].split("=")[0] for words, _ in BAD])
def test_a_mistake_is_one_line(train, model, words: list[str], said: list[str]) -> None:
    found = train(model("llama"), *words)
    assert found.code != 0
    lines = found.output.splitlines()
    assert any("nxdt-nemo: " in line and all(part in line for part in said) for line in lines), found.output[-2000:]
    assert "Traceback" not in found.output
