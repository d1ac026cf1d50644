"""`nxdt-nemo run --config`: configurations of other trainers train, migrated in memory."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from nxdt_nemo.testing.migrated import CASES, CHECKOUTS, Case, train
from nxdt_nemo.testing.script_run import run

NXDT = Path(__file__).parents[1] / "config" / "migrate" / "data" / "small_nxdt.yaml"
pytestmark = [pytest.mark.slow, pytest.mark.ranks]


def started(corpus: Path, tmp_path: Path, *words: str):
    data = [
        f"model.tokenizer.model={corpus / 'tokenizer.model'}",
        f"data.data_prefix=[1.0,{corpus / 'text_document'}]",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
    ]
    environment = {"NXDT_NEMO_RUNTIME": "cpu"}
    return run(Path("--config"), [str(NXDT), *data, *words], tmp_path / "run", cwd=tmp_path, environment=environment)


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


@pytest.mark.upstream
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.dialect}-{case.name}")
def test_upstream_configurations_train_three_steps(case: Case, corpus: Path, tmp_path: Path):
    if not os.environ.get(CHECKOUTS[case.dialect][0]):
        pytest.skip(f"{CHECKOUTS[case.dialect][0]} names no checkout")
    found = train(case, corpus, tmp_path)
    assert found.code == 0, found.output[-3000:]
    assert sorted(found.curve()) == [0, 1, 2]
    assert all(math.isfinite(loss) for loss in found.curve().values())
