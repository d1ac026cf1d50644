"""`nxdt-nemo run --config`: configurations of other trainers train, migrated in memory."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from nxdt_nemo.testing.migrated import CASES, CHECKOUTS, Case, train
from nxdt_nemo.testing.script_run import run

NXDT = Path(__file__).parents[1] / "config" / "migrate" / "data" / "small_nxdt.yaml"
pytestmark = [pytest.mark.slow, pytest.mark.ranks]


def started(corpus: Path, tmp_path: Path, *words: str, data: bool = True):
    given = [
        f"model.tokenizer.model={corpus / 'tokenizer.model'}",
        "model.tokenizer.sentencepiece_legacy=False",  # the test tokenizer's end of text; NeMo's default hides it
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
    ]
    if data:
        given.append(f"data.data_prefix=[1.0,{corpus / 'text_document'}]")
    tmp_path.mkdir(exist_ok=True)
    environment = {"NXDT_NEMO_RUNTIME": "cpu"}
    return run(Path("--config"), [str(NXDT), *given, *words], tmp_path / "run", cwd=tmp_path, environment=environment)


def test_two_ranks_of_an_nxdt_file(corpus, tmp_path):
    found = started(corpus, tmp_path)
    assert found.code == 0, found.output[-3000:]
    losses = found.curve()
    assert sorted(losses) == [0, 1, 2]
    assert all(math.isfinite(loss) for loss in losses.values())
    assert "small_nxdt.yaml: nxdt -> nemo 2.4: " in found.output


def test_layouts_train_the_same(corpus, tmp_path):
    """In float32 one rank and two say the same losses; another learning rate does not."""
    one = ["trainer.devices=1", "distributed_strategy.tensor_model_parallel_size=1", "model.sequence_parallel=False"]
    same = ["precision.type=fp32", "model.hidden_dropout=0.0", "model.make_vocab_size_divisible_by=128"]
    single = started(corpus, tmp_path / "one", *one, *same)
    assert single.code == 0, single.output[-3000:]
    other = started(corpus, tmp_path / "two", *one, *same, "model.optim.lr=1e-2")
    assert single.curve()[0] == other.curve()[0]
    assert abs(single.curve()[2] - other.curve()[2]) > 1e-4


def test_a_lora_file_tunes_what_pretraining_saved(corpus, tmp_path):
    """NxD Training's keys of LoRA, from a .nemo of the same file's pretraining."""
    sizes = ["precision.type=fp32", "model.make_vocab_size_divisible_by=128"]
    params = "exp_manager.checkpoint_callback_params"
    saves = ["exp_manager.create_checkpoint_callback=True", f"{params}.save_nemo_on_train_end=True"]
    base = started(corpus, tmp_path / "base", *sizes, *saves, f"{params}.save_top_k=1", f"{params}.monitor=val_loss")
    assert base.code == 0, base.output[-3000:]
    (saved,) = (tmp_path / "base").rglob("*.nemo")
    lines = [json.dumps({"input": f"the sum of {n} and", "output": f"{n} is {2 * n}"}) for n in range(64)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    strategy = "model_alignment_strategy.peft"
    tuning = [f"{strategy}.lora_rank=4", f"{strategy}.lora_alpha=8", f"{strategy}.lora_dropout=0.0"]
    files = [f"data.{name}={tmp_path / 'sums.jsonl'}" for name in ("train_dir", "val_dir")]
    base_model = f"model.restore_from_path={saved}"
    found = started(corpus, tmp_path / "tuned", *sizes, *tuning, *files, base_model, data=False)
    assert found.code == 0, found.output[-3000:]
    assert sorted(found.curve()) == [0, 1, 2]


@pytest.mark.upstream
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.dialect}-{case.name}")
def test_upstream_configurations_train_three_steps(case: Case, corpus: Path, tmp_path: Path):
    if not os.environ.get(CHECKOUTS[case.dialect][0]):
        pytest.skip(f"{CHECKOUTS[case.dialect][0]} names no checkout")
    found = train(case, corpus, tmp_path)
    assert found.code == 0, found.output[-3000:]
    assert sorted(found.curve()) == [0, 1, 2]
    assert all(math.isfinite(loss) for loss in found.curve().values())
