"""`nxdt-nemo compile` on XLA:CPU: a second start of the same configuration meets no graph that the cache has not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nxdt_nemo._resources import folder
from nxdt_nemo.testing.script_run import tiny, write_corpus

SCRIPT = Path(__file__).resolve().parents[1] / "nemo" / "gpt_pretraining.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("with_torch_xla")
def test_a_second_start_misses_nothing(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    words = [word for word in tiny(corpus, tmp_path / "unused") if not word.startswith("--")]

    def compiled(*more: str) -> dict[str, int]:
        config = str(folder("configs") / "demo_llama.yaml")
        options = ["--script", str(SCRIPT), "--cache", str(tmp_path / "cache"), "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "nxdt_nemo", "compile", config, *words, *more, *options],
            env=os.environ | {"NXDT_NEMO_RUNTIME": "xla"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    first, second = compiled(), compiled()
    assert first["graphs"] == first["missed"] > 1
    assert (second["graphs"], second["missed"]) == (first["graphs"], 0)
    assert compiled("model.hidden_size=64")["missed"] > 1  # the counter can count
    assert [entry.name for entry in (tmp_path / "unused").iterdir()] == ["index"]  # the data's
    assert not list(tmp_path.rglob("*.ckpt")) + list(tmp_path.rglob("events*"))
