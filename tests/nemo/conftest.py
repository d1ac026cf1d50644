"""Real NeMo runs: a script in a process of its own, on a real corpus, read back from its TensorBoard log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.testing.script_run import OURS, Run, run, tiny, write_corpus

SCRIPT = Path(__file__).with_name("gpt_pretraining.py")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.model and text_document.{bin,idx}."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def hugging_face_llama(folder: Path, seed: int, length: int = 32, **named: Any) -> Path:
    """The tiny Llama as transformers writes one, with random weights; returns `folder`.

    length   positions
    named    other keys of its configuration
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        **named,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


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
