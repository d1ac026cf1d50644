"""Real checkpoints, written by Megatron-LM and transformers, and what reads them for a comparison.

data/*.tar.xz were written by upstream's code on CPU ranks, with random weights after two training steps: Megatron-LM
core_v0.13.1 (`ll_*`: the same Llama in two formats; `mx_*`: a Mixtral, its optimizer state taken out; `t5_*`: a T5,
converted to stages before its second step), megatron-core's zarr backend (`zarr_tp2_do` with Megatron-LM's distributed
optimizer), and transformers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdt_nemo.checkpoint import formats
from nxdt_nemo.checkpoint.boxes import whole
from nxdt_nemo.checkpoint.dtypes import DType, Raw, dtype_of
from nxdt_nemo.checkpoint.formats.base import Options, Source
from nxdt_nemo.checkpoint.io.pickling import Pending
from nxdt_nemo.checkpoint.output import JOURNAL
from nxdt_nemo.checkpoint.tensors import KINDS, logical_of

DATA = Path(__file__).parent / "data"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """unpacked(name): the folder of one of data/*.tar.xz. Not to be changed; `copied` gives one that may be."""
    root = tmp_path_factory.mktemp("fixtures")
    done: dict[str, Path] = {}

    def unpack(name: str) -> Path:
        if name not in done:
            done[name] = unpack_into(root, name)
        return done[name]

    return unpack


def unpack_into(root: Path, name: str) -> Path:
    """The folder of one of data/*.tar.xz, below `root`."""
    with tarfile.open(DATA / f"{name}.tar.xz") as tar:
        tar.extractall(root, filter="data")
        return root / tar.getnames()[0].split("/")[0]


@pytest.fixture
def copied(unpacked: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """copied(name): a copy that the test may damage."""
    return lambda name: Path(shutil.copytree(unpacked(name), tmp_path / "source"))


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """hf_model(name): a small seeded model of that family, written by transformers; name "qwen2 tied" ties."""
    root = tmp_path_factory.mktemp("hf")

    def make(name: str) -> Path:
        folder = root / name.replace(" ", "_")
        if not folder.exists():
            import transformers

            torch.manual_seed(1)
            kind = "AutoModelForPreTraining" if name.startswith("bert") else "AutoModelForCausalLM"
            model = getattr(transformers, kind).from_config(config_of(name))
            with torch.no_grad():  # norms are ones and biases zeros: a misplaced one would not show
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            model.save_pretrained(folder)
        return folder

    return make


def config_of(name: str) -> Any:
    """A transformers configuration."""
    import transformers as t

    bert = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    table: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaConfig(**SMALL),
        "mistral": lambda: t.MistralConfig(**SMALL, sliding_window=64),
        "mixtral": lambda: t.MixtralConfig(**SMALL, num_local_experts=4),
        "qwen2": lambda: t.Qwen2Config(**SMALL),
        "qwen2 tied": lambda: t.Qwen2Config(**SMALL, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**SMALL, head_dim=16),
        "gemma": lambda: t.GemmaConfig(**SMALL, head_dim=16),
        "bert": lambda: t.BertConfig(**bert),
        "bert before": lambda: t.MegatronBertConfig(**bert),
        "gpt2": lambda: t.GPT2Config(n_embd=64, n_layer=4, n_head=8, vocab_size=1000, n_positions=128),
    }
    return table[name]()


def read(path: Path, **options: Any) -> Source:
    """A source with its optimizer state."""
    return formats.read(path, Options(**{"optimizer": True} | options))


def tensor(source: Source, kind: str, name: str) -> torch.Tensor:
    """One whole logical tensor."""
    want = source.catalog.part(kind, name, whole(logical_of(name).size(source.model)))
    return as_torch(want.tensor(), want.dtype)


def as_torch(array: Raw, dtype: DType) -> torch.Tensor:
    """A copy of it as torch's."""
    return torch.from_numpy(array.copy()).view(getattr(torch, dtype.name))


def pending(tensor: torch.Tensor) -> Pending:
    """A torch tensor to be written."""
    dtype = dtype_of(tensor.dtype)
    return Pending.given(tensor.contiguous().view(getattr(torch, dtype.raw.name)).numpy(), dtype)


def assert_same(first: Source, second: Source, kinds: tuple[str, ...] = KINDS) -> int:
    """All tensors of both are equal to the bit; how many there are. Padding that only one has is left out."""
    count = 0
    for kind in kinds:
        names = first.catalog.names(kind)
        assert set(names) == set(second.catalog.names(kind)), kind
        for name in names:
            one, other = tensor(first, kind, name), tensor(second, kind, name)
            rows = min(len(one), len(other)) if "V" in logical_of(name).shape else len(one)
            assert one.dtype == other.dtype
            assert torch.equal(one[:rows], other[:rows]), f"{kind} {name}"
            count += 1
    return count


def files_of(folder: Path) -> set[str]:
    """All files below a folder; empty if it is not there."""
    return {os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names}


def slow_writes(seconds: float) -> str:
    """The beginning of a program whose every write takes that long, so that there is a half-way."""
    return f"""
import os, time
write = os.pwrite
def slowly(*arguments):
    time.sleep({seconds})
    return write(*arguments)
os.pwrite = slowly
"""


def kill_half_way(conversion: subprocess.Popen[Any], partial: Path) -> int:
    """Kill it when three files are finished; its exit code. `partial` is the folder that it writes to."""
    journal, limit = partial / JOURNAL, time.monotonic() + 200
    try:
        while not journal.exists() or len(journal.read_text().splitlines()) < 4:
            assert conversion.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
    finally:
        conversion.kill()
        code = conversion.wait()
    return code
