"""Generation on the xla lane, on XLA:CPU: transformers' tokens, and two graphs for prompts of whatever lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import Run, hugging_face_llama
from .test_generation import NEW, SCRIPT

BATCHES = [
    [[5, 9, 300, 17, 44, 61, 8], [12, 700, 3]],
    [[40, 41, 42, 43, 44], [7, 8]],
    [[99, 100, 101], [3, 2, 30, 4, 5, 6, 7, 8, 9]],
]


@pytest.mark.slow
@pytest.mark.usefixtures("with_torch_xla")
def test_greedy_tokens_and_nothing_compiled_after_the_first_batch(train: Callable[..., Run], tmp_path: Path) -> None:
    import transformers

    base = hugging_face_llama(tmp_path / "base", seed=4, initializer_range=0.2)
    (tmp_path / "questions.json").write_text(json.dumps({"batches": BATCHES, "tokens": NEW}))
    environment = {"QUESTIONS": str(tmp_path / "questions.json"), "NXDT_NEMO_RUNTIME": "xla"}
    run = train(f"++model.restore_from_path={base}", script=SCRIPT, environment=environment)
    assert run.code == 0, run.output[-4000:]
    assert "nxdt_nemo: lane xla" in run.output
    line = next(line for line in run.output.splitlines() if line.startswith("found: "))
    found = json.loads(line.removeprefix("found: "))
    model = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    for batch, part in zip(BATCHES, found, strict=True):
        for prompt, greedy, sampled in zip(batch, part["greedy"], part["top_p 0"], strict=True):
            with torch.no_grad():
                made = model.generate(torch.tensor([prompt]), do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW)
            expected = made[0].tolist()
            assert greedy[: len(expected)] == expected
            assert sampled[: len(expected)] == expected
    first, *others = [part["counters"] for part in found]
    for later in others:
        assert later["compiled"] == first["compiled"]
        assert later["executed"] > first["executed"]
        assert {name: count for name, count in later.items() if name.startswith("aten::")} == {}
