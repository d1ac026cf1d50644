"""Whole NeMo jobs of a few seconds: a script through the command line, on real text, read back from what it leaves.

Room testing/. A tiny Llama over configs/demo_llama.yaml, its corpus, the processes of a job, and what can be compared
afterwards: logged curves and every tensor of a checkpoint; the same Llama as transformers writes it. For tests/nemo and
tools/resume.py, and for a script of yours. Proof: tests/nemo/.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxdt_nemo._resources import folder as resource

if TYPE_CHECKING:
    import torch

__all__ = ["OURS", "Run", "hugging_face_llama", "read_tensors", "run", "start", "tiny", "write_corpus", "write_rows"]

OURS = ("-m", "nxdt_nemo", "run")
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}


@dataclass(frozen=True)
class Run:
    """How a job ended, and the folder that it logged to."""

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

    @property
    def resumed_from(self) -> str:
        """The name of the checkpoint that Lightning restored; "" if none."""
        _, found, rest = self.output.partition("Restoring states from the checkpoint path at ")
        return Path(rest.split("\n")[0].strip()).name if found else ""


def write_corpus(folder: Path) -> Path:
    """Python's own documentation as text_document.{bin,idx}, with tokenizer.model of 1,024 pieces; returns `folder`."""
    from pydoc_data.topics import topics

    import numpy as np
    import sentencepiece
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir(parents=True, exist_ok=True)
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


def hugging_face_llama(folder: Path, seed: int, length: int = 32, **named: Any) -> Path:
    """The tiny Llama as transformers writes one, with random weights; returns `folder`.

    length   positions
    named    other keys of its configuration, or other values
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    keys: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
    }
    config = transformers.LlamaConfig(**(keys | named))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(corpus: Path, length: int) -> Path:
    """The same text as rows of `length` token ids, as NxD Training's users prepare it; returns its folder."""
    import datasets
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    ids = [int(token) for document in IndexedDataset(str(corpus / "text_document")) for token in document]
    rows = [ids[at : at + length] for at in range(0, len(ids) - length, length)]
    folder = corpus / f"rows_{length}"
    datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(str(folder))
    return folder


def tiny(corpus: Path, folder: Path) -> list[str]:
    """Overrides of configs/demo_llama.yaml: a model that takes milliseconds a step, at rates that learn, one rank."""
    return [
        f"--config-path={resource('configs')}",
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


def start(
    script: Path,
    arguments: Sequence[str],
    *,
    command: Sequence[str] = OURS,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: Any = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """The job's first process, in a process group of its own, with no launcher's variables of this process."""
    inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    return subprocess.Popen(
        [sys.executable, *command, str(script), *arguments],
        env=inherited | {"NXDT_NEMO": ""} | dict(environment or {}),
        cwd=cwd,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(script: Path, arguments: Sequence[str], folder: Path, *, seconds: float = 420, **named: Any) -> Run:
    """A job to its end, and nothing of it outlives that. Raises subprocess.TimeoutExpired after `seconds`."""
    process = start(script, arguments, **named)
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):  # ranks that outlive a failed launcher
            os.killpg(process.pid, signal.SIGKILL)
    return Run(process.returncode, output, folder)


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Each tensor of a distributed checkpoint by its name, whole, with torch's own reader."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    _load_state_dict(found, FileSystemReader(str(checkpoint)), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    flat: dict[str, torch.Tensor] = {}
    _flatten(found, "", flat)
    return flat


def _flatten(value: Any, key: str, into: dict[str, torch.Tensor]) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _flatten(inner, f"{key}.{name}" if key else str(name), into)
    elif hasattr(value, "dtype"):
        into[key] = value
