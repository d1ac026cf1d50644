"""Checkpoints of other tools, named in a NeMo configuration: imported, and every tensor of them is in the run.

What a run starts from it saves before its first step, and that is compared with the source to the bit.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.checkpoint import formats
from nxdt_nemo.checkpoint.boxes import whole
from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.dtypes import BFLOAT16, FLOAT32, Raw, cast, same
from nxdt_nemo.checkpoint.formats.base import Options, Source, Target
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.tensors import KINDS, logical_of

from .conftest import O2, Run, hugging_face_llama

FIXTURES = Path(__file__).parents[1] / "checkpoint" / "data"
RESTORES = Path(__file__).with_name("restores.py")
TP2 = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
PP2 = ("trainer.devices=2", "model.pipeline_model_parallel_size=2")
# The Llama of tests/checkpoint/data, whose rows beyond the run's tokenizer stay behind.
MEGATRON = tuple(
    f"model.{key}={value}"
    for key, value in {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 176,
    }.items()
)
pytestmark = pytest.mark.ranks


def fixture(name: str, folder: Path) -> Path:
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as tar:
        tar.extractall(folder, filter="data")
        return folder / tar.getnames()[0].split("/")[0]


def assert_started_from(source: Source, start: Path, kinds: tuple[str, ...]) -> None:
    """The saved tensors are the source's; of a vocabulary, the rows that both have."""
    found = formats.read(start, Options(optimizer=len(kinds) > 1))
    for kind in kinds:
        names = source.catalog.names(kind)
        assert names and set(names) == set(found.catalog.names(kind)), kind
        for name in names:
            one, other = (_tensor(at, kind, name) for at in (source, found))
            rows = min(len(one), len(other)) if "V" in logical_of(name).shape else len(one)
            assert same(one[:rows], other[:rows]), f"{kind} {name}"


def _tensor(source: Source, kind: Any, name: str) -> Raw:
    want = source.catalog.part(kind, name, whole(logical_of(name).size(source.model)))
    return cast(want.tensor(), want.dtype, FLOAT32)


def start(train: Callable[..., Run], tmp_path: Path, *overrides: str, **named: Any) -> Run:
    """A run of three steps; what it started from is in tmp_path/start."""
    environment = {"START": str(tmp_path / "start.ckpt")}
    steps = ("trainer.max_steps=3", "trainer.val_check_interval=3")
    run = train(*steps, *overrides, script=RESTORES, environment=environment, **named)
    assert run.code == 0, run.output[-4000:]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("place", [TP2, PP2, (*TP2, *O2)])
def test_hugging_face_weights(train: Callable[..., Run], tmp_path: Path, place: tuple[str, ...]) -> None:
    source = hugging_face_llama(tmp_path / "models" / "llama", seed=3)
    if O2[0] in place:  # a run in bfloat16 rounds what it is given
        convert(source, tmp_path / "models/bf16", "hf", wanted=Target(dtype=BFLOAT16))
        source = tmp_path / "models/bf16"
    run = start(train, tmp_path, *place, f"+model.restore_from_path={source}")
    assert_started_from(formats.read(source, Options()), tmp_path / "start", ("model",))
    (kept,) = source.parent.glob(f"{source.name}.imported-*")
    assert run.output.count("imported ") == 1  # by rank 0, before the other is there
    assert str(kept) in run.output
    assert len(run.curve()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ll_torch_tp2pp2_do", "ll_td_tp2pp2"])
@pytest.mark.parametrize("optimizer", ["fused_adam", "distributed_fused_adam", "mcore_distributed_optim"])
def test_megatrons_weights_and_optimizer(train: Callable[..., Run], tmp_path: Path, name: str, optimizer: str) -> None:
    """Megatron-LM's own files of TP 2 x PP 2, a run of TP 2: a new run, with the state of the old one's optimizer."""
    source = fixture(name, tmp_path)
    keys = (*TP2, *O2, *MEGATRON, f"model.optim.name={optimizer}", f"+model.restore_from_ckpt={source}")
    run = start(train, tmp_path, *keys)
    assert_started_from(formats.read(source, Options(optimizer=True)), tmp_path / "start", KINDS)
    assert sorted(run.curve()) == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("place", [(*TP2, *O2), PP2])
def test_megatrons_run_goes_on(train: Callable[..., Run], tmp_path: Path, place: tuple[str, ...]) -> None:
    """Its two steps and eight samples count; in float32 the main parameters are the weights."""
    source = fixture("ll_td_tp2pp2", tmp_path)
    keys = ("model.optim.name=mcore_distributed_optim", f"+exp_manager.resume_from_checkpoint={source}")
    run = start(train, tmp_path, *place, *MEGATRON, *keys)
    theirs = formats.read(source, Options(optimizer=True))
    kinds: tuple[str, ...] = KINDS
    if O2[0] not in place:
        theirs.catalog.rename("fp32_param", "model")
        kinds = tuple(kind for kind in KINDS if kind != "fp32_param")
    assert_started_from(theirs, tmp_path / "start", kinds)
    assert sorted(run.curve()) == [2]
    assert run.curve("consumed_samples")[2] == 16.0


@pytest.mark.slow
def test_two_runs_at_once_and_a_third(train: Callable[..., Run], tmp_path: Path) -> None:
    """torchrun's ranks both come first: one imports, the other waits or finds it; so does the next run."""
    source = hugging_face_llama(tmp_path / "models" / "llama", seed=3)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "nxdt_nemo", "run")
    for name in ("first", "second"):
        run = start(train, tmp_path, *TP2, f"+model.restore_from_path={source}", command=torchrun, name=name)
        assert len(run.curve()) == 3
    assert len(list(source.parent.iterdir())) == 2  # no lock, no half
    assert "was imported before" in run.output


@pytest.mark.slow
def test_what_nemo_reads_stays(train: Callable[..., Run], tmp_path: Path) -> None:
    source = hugging_face_llama(tmp_path / "models" / "llama", seed=3)
    convert(source, tmp_path / "models/llama.nemo", "nemo", wanted=Target(Layout(), FLOAT32))
    run = start(train, tmp_path, *TP2, f"+model.restore_from_path={tmp_path / 'models/llama.nemo'}")
    assert_started_from(formats.read(source, Options()), tmp_path / "start", ("model",))
    assert "imported" not in run.output


MISTAKES = [  # overrides, what the line must name
    (["+model.restore_from_path={tmp}/gone"], ["model.restore_from_path", "is not there"]),
    (["+model.restore_from_path={tmp}/empty"], ["model.restore_from_path", "an empty folder", "hf"]),
    (["+model.restore_from_path={llama}", "model.num_layers=3"], ["model.num_layers=3", "2 in the checkpoint"]),
    (["+model.restore_from_ckpt={llama}"], ["no optimizer state", "model.restore_from_path"]),
    (["+model.restore_from_path={cut}"], ["model.restore_from_path", "model.safetensors", "its header says"]),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES, ids=lambda value: str(value[-1]))
def test_one_line(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    """In one process: `prepare` is what every script's configuration passes."""
    from hydra import compose, initialize_config_dir

    from nxdt_nemo._resources import folder
    from nxdt_nemo.errors import UserError
    from nxdt_nemo.nemo.core.config.hydra_runner import prepare
    from nxdt_nemo.testing.script_run import tiny

    given = {
        "tmp": tmp_path,
        "llama": hugging_face_llama(tmp_path / "llama", seed=3),
        "cut": hugging_face_llama(tmp_path / "cut", seed=3),
    }
    (tmp_path / "empty").mkdir()
    file = tmp_path / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for name in ("tokenizer.model", "text_document.bin", "text_document.idx"):
        (tmp_path / name).touch()
    before = set(tmp_path.rglob("*"))
    with initialize_config_dir(str(folder("configs")), version_base=None):
        asked = [text for text in tiny(tmp_path, tmp_path / "run") if not text.startswith("--")]
        cfg = compose("demo_llama", [*asked, *(text.format(**given) for text in overrides)])
    with pytest.raises(UserError) as error:
        prepare(cfg)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert set(tmp_path.rglob("*")) == before
