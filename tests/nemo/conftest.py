"""Real NeMo runs: a script in a process of its own, on a real corpus, read back from its TensorBoard log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nxdt_nemo.testing.script_run import OURS, Run, hugging_face_llama, run, tiny, write_corpus

__all__ = ["O2", "Run", "corpus", "hugging_face_llama", "train"]

SCRIPT = Path(__file__).with_name("gpt_pretraining.py")
O2 = ("trainer.precision=bf16", "model.megatron_amp_O2=True")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.model and text_document.{bin,idx}."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def train(corpus: Path, tmp_path: Path) -> Callable[..., Run]:
    """`train("trainer.max_steps=4", ...)`: run the script to its end in the folder `name`."""

    def job(
        *overrides: str,
        name: str = "run",
        script: Path = SCRIPT,
        command: tuple[str, ...] = OURS,
        environment: dict[str, str] | None = None,
        seconds: int = 420,
        arguments: list[str] | None = None,
    ) -> Run:
        folder = tmp_path / name
        given = tiny(corpus, folder) if arguments is None else arguments
        return run(
            script,
            [*given, *overrides],
            folder,
            seconds=seconds,
            command=command,
            environment=environment,
            cwd=tmp_path,
        )

    return job
