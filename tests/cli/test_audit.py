"""`nxdt-nemo audit` as it is called: what it prints, writes and ends with; mistakes on its command line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nxdt_nemo.audit.points import Points
from nxdt_nemo.audit.summary import ROOM, Audit, Rank
from nxdt_nemo.cli.app import parsed
from nxdt_nemo.cli.audit import agreement, report
from nxdt_nemo.errors import UserError

from .conftest import Start

LLAMA = ["model=llama3_8b", "target=trn2"]
DEMO = ["demo_llama", "trainer.devices=4", "+neuron.vocab_size=1024", "model.global_batch_size=32"]  # TP 2 x DP 2


@pytest.mark.usefixtures("with_torch_xla")
def test_a_job_is_reported_and_its_graphs_are_written(ours: Start, tmp_path: Path) -> None:
    """Without main weights and a sharded optimizer: torch's own data parallelism, NeMo's own clipping."""
    given = ["--rank", "0,1", "--target", "trn2.48xlarge", "--hlo", "hlo"]
    found = ours("audit", *DEMO, "model.num_layers=1", *given, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    lines = found.stdout.splitlines()
    rows = [line.split(" | ") for line in lines if re.match(r"\| [01] \| 1 of 1", line)]
    assert [row[5] for row in rows] == ["1.0000", "1.0000"]
    assert rows[0][7] == rows[1][7]  # one program
    assert re.search(r"^- memory: 0\.\d GB live .* of 25\.8 GB a rank of trn2\.48xlarge: fits$", found.stdout, re.M)
    assert "deadlock check: the one pair that waits for each other lowers the same collectives" in found.stdout
    assert "FLOPs are those of the lowered products" in found.stdout
    assert any(line.startswith("    layer      2 T H (q + 2 g) D") for line in lines)
    assert {file.name for file in (tmp_path / "hlo").iterdir()} == {"rank0.hlo", "rank1.hlo"}
    texts = [(tmp_path / "hlo" / f"rank{rank}.hlo").read_text() for rank in (0, 1)]
    assert "all-reduce" in texts[0] and replaced(texts[0]) == replaced(texts[1])


def replaced(text: str) -> str:
    """Without the number of the module's name."""
    return re.sub(r"IrToHlo\.\d+", "IrToHlo", text)


@pytest.mark.slow
@pytest.mark.usefixtures("with_torch_xla")
def test_other_groups_of_a_rank_end_it_with_1(ours: Start) -> None:
    """Rank 1 counts TP 1, with a batch of as many micro-batches: its groups differ alone."""
    otherwise = ["--except", "1:model.tensor_model_parallel_size=1", "--except", "1:model.global_batch_size=64"]
    found = ours("audit", *DEMO, "--rank", "0", *otherwise, "--json", timeout=300)
    assert found.returncode == 1, found.stderr[-3000:]
    told = json.loads(found.stdout)
    assert re.search(r"rank 0 has .* over ranks 0,1, rank 1 has .* over ranks 0,1,2,3", told["mismatch"])
    assert "micro-batches" not in told["mismatch"] and told["lowered_layers"] == [1, 2]
    assert told["formula"].startswith("T = S B") and told["fits"] is None and told["dtypes"]["f32"] > 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "workflow=lora", *LLAMA], "train: model.peft: an audit lowers the pretraining of a GPT only"),
        (["train", "workflow=dpo", *LLAMA], "train: neuron.alignment: an audit lowers"),
        (["train", "model=bert"], "train: model.mcore_bert: an audit lowers"),
        (["train", *LLAMA, "model.tensor_model_parallel_size=1"], "model.tensor_model_parallel_size above 1; use"),
        (["train", *LLAMA, "--world", "24"], "24 ranks are not divisible by model.tensor_model_parallel_size"),
        (["train", *LLAMA, "--world", "-64"], "--world: -64 is no number of ranks"),
        (["train", *LLAMA, "--world", "0"], "--world: 0 is no number of ranks"),
        (["train", *LLAMA, "--rank", "0", "--ranks", "all"], "--rank and --ranks both say"),
        (["train", *LLAMA, "--ranks", "foo"], "--ranks: 'foo' is no list of ranks"),
        (["train", *LLAMA, "--rank", "1,"], "--rank: '1,' is no list of ranks"),
        (
            ["train", *LLAMA, "--except", "5:model.global_batch_size=7"],
            "--except 5: train: model.global_batch_size=7 is not divisible by",
        ),
        (["train", *LLAMA, "--except", "5"], "--except: '5' is no override of a rank"),
        (["train", *LLAMA, "--target", "trn1.2xlarge"], "trainer.devices=64, and a trn1.2xlarge has 2; use 2"),
        (["train", *LLAMA, "trainer.devices=256"], "trainer.devices=256, and a trn2.48xlarge has 128; use 64 or 128"),
        (
            ["train", *LLAMA, "--world", "96", "model.global_batch_size=6"],
            "--world: 96 ranks are no whole number of nodes",
        ),
        (["train", *LLAMA, "trainer.devices=32", "--world", "64"], "leaves a part of each trn2.48xlarge idle"),
        (["."], ".: is a folder; name a YAML file in it"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_started(arguments: list[str], line: str) -> None:
    with pytest.raises(UserError) as raised:
        parsed(["audit", *arguments])
    assert line in str(raised.value) and "\n" not in str(raised.value)


RANK = Rank(
    0, (0, 1), graphs=2, executions=1, operations=9, parameters=8, flops=7.0, analytic=None, transfers=(),
    least_bytes=None, expected_bytes=None, peak_bytes=100, state_bytes=50, bounds=None, host_transfers={}, fallbacks={},
    dtypes={"bf16": 75, "f32": 25}, program="0" * 64,
)  # fmt: skip
FOUND = Audit(2, Points((1,), (1,), (1, 1)), "trn2.48xlarge", 125, (RANK,), mismatch="", compared=0, seconds=1.0)


@pytest.mark.parametrize(
    ("peak", "words", "fits", "runs"),
    [
        (int(125 * ROOM), "fits", True, True),
        (int(125 * ROOM) + 1, "LITTLE ROOM for gaps and the compiler's own buffers", False, True),
        (126, "DOES NOT FIT", False, False),
    ],
)
def test_memory_leaves_room_for_the_compiler(peak: int, words: str, fits: bool, runs: bool) -> None:
    found = replace(FOUND, ranks=(replace(RANK, peak_bytes=peak),))
    assert (found.fits, found.runs) == (fits, runs) == (found.as_json()["fits"], runs)
    assert [line.rpartition(": ")[2] for line in report(found) if line.startswith("- memory")] == [words]
    assert "- bytes of results by dtype, rank 0: bf16 75%, f32 25%" in [*report(found)]
    assert replace(found, hbm=0).fits is None and replace(found, hbm=0).runs


@pytest.mark.parametrize("wrong", ["fallbacks", "host_transfers"])
def test_what_leaves_the_graph_does_not_run_as_it_stands(wrong: str) -> None:
    apart = replace(RANK, **{wrong: {"aten::logaddexp": 1}})  # type: ignore[arg-type]
    assert FOUND.runs and not replace(FOUND, ranks=(apart,)).runs and not replace(FOUND, mismatch="rank 1").runs
    assert any("aten::logaddexp" in line for line in report(replace(FOUND, ranks=(apart,))))


def test_a_deadlock_check_without_pairs_does_not_say_that_all_is_well() -> None:
    assert "no two of the lowered ranks are in one group" in agreement(0)
    assert agreement(1).startswith("the one pair") and agreement(3).startswith("3 pairs")
