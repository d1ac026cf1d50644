"""The pieces of `make demo-finetune`, and, marked slow, the demo itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

import demo_finetune  # noqa: E402


def test_questions_are_of_functions_that_are_there() -> None:
    pairs = [demo_finetune.question(name) for name in demo_finetune.FUNCTIONS]
    assert len({pair["input"] for pair in pairs}) == len({pair["output"] for pair in pairs}) == len(pairs) == 12
    assert all(20 < len(pair["output"]) < 120 for pair in pairs)
    assert pairs[0] == {
        "input": "Question: what does textwrap.dedent do? Answer:",
        "output": "Remove any common leading whitespace from every line in `text`.",
    }


def test_right_answers_are_counted() -> None:
    pairs = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    assert demo_finetune.right(["b", "x"], pairs) == 1
    page = demo_finetune.page(
        [("LoRA", "x | y")], pairs, demo_finetune.Answers(["p", "q"], ["b", "d"], ["b", "d"], {"base": 1.0})
    )
    assert "| LoRA | x &#124; y |" in page
    assert "| c | q | d |" in page


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_the_answers_change_as_trained(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "demo_finetune.py"), "--folder", str(tmp_path / "demo")]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    page = (tmp_path / "demo_finetune.md").read_text()
    counts = {name: int(count) for name, count in re.findall(r"\| right answers, ([\w +]+) \| (\d+) of 12", page)}
    assert counts["base"] == 0
    assert counts["merged"] == counts["base + peft"] >= 11
    losses = {name: float(loss) for name, loss in re.findall(r"\| right answers, ([\w +]+) \| .*loss ([\d.]+)", page)}
    by_nemo = float(re.search(r"validation loss by NeMo, TP=2 \| ([\d.]+)", page)[1])  # type: ignore[index]
    assert losses["merged"] == pytest.approx(by_nemo, abs=2e-4)
    assert losses["base + peft"] == pytest.approx(by_nemo, abs=2e-4)
    questions = (tmp_path / "demo" / "finetune" / "questions.jsonl").read_text().splitlines()
    assert all(json.loads(line)["output"] in page.replace("&#124;", "|") for line in questions[:3])
