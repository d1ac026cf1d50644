"""Real NeMo runs: a script in a process of its own, on a real corpus, read back from its TensorBoard log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("gpt_pretraining.py")
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}


@dataclass(frozen=True)
class Run:
    """How a run ended, and what it logged."""

    code: int
    output: str
    folder: Path

    def curve(self, name: str = "reduced_train_loss") -> dict[int, float]:
        """Logged float32 values by step; a step that was run twice keeps what the later process logged."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        values: dict[int, float] = {}
        for file in sorted(self.folder.rglob("events*"), key=lambda path: path.name):
            events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
            if name in events.Tags()["scalars"]:
                values |= {event.step: event.value for event in events.Scalars(name)}
        return values


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.model and text_document.{bin,idx}: Python's own documentation, 1,024 tokens."""
    from pydoc_data.topics import topics

    import numpy as np
    import sentencepiece
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("corpus")
    texts = [text.replace("\n", " ") for text in topics.values()][:40]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=1024,
        model_type="bpe",
        max_sentence_length=1 << 18,
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    builder = IndexedDatasetBuilder(str(folder / "text_document.bin"), dtype=np.int32)
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_id()]
        builder.add_document(torch.tensor(ids, dtype=torch.int32), [len(ids)])
    builder.finalize(str(folder / "text_document.idx"))
    return folder


def tiny(corpus: Path, folder: Path) -> list[str]:
    """Overrides of configs/demo_llama.yaml: a model that takes milliseconds a step, at rates that learn."""
    return [
        f"--config-path={ROOT / 'configs'}",
        "--config-name=demo_llama",
        f"exp_manager.explicit_log_dir={folder}",
        f"model.tokenizer.model={corpus / 'tokenizer.model'}",
        f"model.data.data_prefix=[1.0,{corpus / 'text_document'}]",
        f"model.data.index_mapping_dir={folder / 'index'}",
        "model.data.splits_string='900,100,0'",
        "model.make_vocab_size_divisible_by=64",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "model.num_attention_heads=4",
        "model.encoder_seq_length=32",
        "model.micro_batch_size=2",
        "model.global_batch_size=8",
        "model.optim.sched.warmup_steps=2",
        "trainer.limit_val_batches=1",
        "trainer.devices=1",
        "model.tensor_model_parallel_size=1",
    ]


@pytest.fixture
def train(corpus: Path, tmp_path: Path) -> Callable[..., Run]:
    """`train("trainer.max_steps=4", ...)`: run the script to its end in the folder `name`."""

    def start(
        *overrides: str,
        name: str = "run",
        script: Path = SCRIPT,
        command: tuple[str, ...] = ("-m", "nxdt_nemo", "run"),
        environment: dict[str, str] | None = None,
        seconds: int = 420,
        arguments: list[str] | None = None,
    ) -> Run:
        folder = tmp_path / name
        inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
        given = tiny(corpus, folder) if arguments is None else arguments
        process = subprocess.Popen(
            [sys.executable, *command, str(script), *given, *overrides],
            env=inherited | {"NXDT_NEMO": ""} | (environment or {}),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        finally:
            # Ranks that outlive a failed launcher must not outlive the test.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return Run(process.returncode, output, folder)

    return start
