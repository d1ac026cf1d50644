"""NeMo 2.0 (nemo.lightning.MegatronStrategy, llm.train) by a script written for GPUs: trains, saves, and goes on from
one rank's checkpoint in other layouts with the losses of one rank."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Target
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.tensors import KINDS

from .conftest import Run

TOOLS = Path(__file__).parents[2] / "tools"
pytestmark = pytest.mark.ranks

SCRIPT = TOOLS / "nemo2_lib" / "pretraining.py"
COUNTS = Path(__file__).with_name("counts_nemo2.py")
FIRST, LAST = 4, 8
Losses = list[float]


@pytest.fixture
def losses(train: Callable[..., Run], tmp_path: Path) -> Callable[..., Losses]:
    """Losses of a run in a folder, which goes on from what is in there."""

    def job(folder: Path, *words: str, script: Path = SCRIPT, seconds: int = 240, **named: Any) -> Losses:
        folder.mkdir(exist_ok=True)
        given = [f"folder={folder}", *words]
        done = train(name=f"{folder.name}_run", script=script, arguments=given, seconds=seconds, **named)
        assert done.code == 0, done.output[-3000:]
        found: Losses = json.loads((folder / "losses.json").read_text())
        return found

    return job


def test_one_rank_trains_and_saves(losses: Callable[..., Losses], tmp_path: Path) -> None:
    found = losses(tmp_path / "one", "steps=2")
    assert len(found) == 2 and all(6.8 < loss < 7.1 for loss in found)  # ln 1000 = 6.9
    (saved,) = (tmp_path / "one" / "default" / "checkpoints").glob("*-last")
    assert (saved / "weights" / ".metadata").is_file() and (saved / "context" / "io.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.usefixtures("with_torch_xla")
def test_one_rank_on_the_xla_lane(losses: Callable[..., Losses], tmp_path: Path, family: str) -> None:
    """Goes on from the cpu lane's checkpoint, validates, saves and goes on again as the cpu lane does; compiles nothing
    after its second validation."""
    lanes, counts = [tmp_path / "cpu", tmp_path / "xla"], tmp_path / "counts.json"
    traced = {"NXDT_NEMO_RUNTIME": "xla", "COUNTS": str(counts)}
    model = ("layers=1", f"family={family}")
    first = losses(lanes[0], f"steps={FIRST}", *model)
    shutil.copytree(*lanes)
    for steps in (FIRST + LAST, FIRST + 2 * LAST):
        words = (f"steps={steps}", *model)
        expected = losses(lanes[0], *words)
        found = losses(lanes[1], *words, script=COUNTS, environment=traced, seconds=420)
        assert len(found) == LAST and found == pytest.approx(expected, rel=1e-5)
        parts = json.loads(counts.read_text())
        assert len(parts) == LAST
        assert [part["compiled"] for part in parts[5:]] == [0] * (LAST - 5)
        saved = [{path.name for path in (lane / "default" / "checkpoints").iterdir()} for lane in lanes]
        assert saved[0] == saved[1] and any("val_loss=" in name for name in saved[0])
    assert expected[-1] < first[0] - 0.1, "a model that learned nothing would agree"


LAYOUTS = {
    "tp2": "devices=2 tensor_model_parallel_size=2",
    "tp2sp": "devices=2 tensor_model_parallel_size=2 sequence_parallel=True",
    "pp2": "devices=2 pipeline_model_parallel_size=2",
    "vpp2": "devices=2 pipeline_model_parallel_size=2 virtual_pipeline_model_parallel_size=2",
    "cp2": "devices=2 context_parallel_size=2",
    "dp2zero": "devices=2 zero=True",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_another_layout_goes_on_as_one_rank(losses: Callable[..., Losses], tmp_path: Path, family: str) -> None:
    of = f"family={family}"
    base = tmp_path / "base"
    first = losses(base, f"steps={FIRST}", of)
    shutil.copytree(base, tmp_path / "one")
    one = losses(tmp_path / "one", f"steps={LAST}", of)
    assert len(one) == LAST - FIRST
    assert abs(one[0] - first[-1]) > 1e-3, "a run that learned nothing would agree with any other"
    for name, words in LAYOUTS.items():
        shutil.copytree(base, tmp_path / name)
        found = losses(tmp_path / name, f"steps={LAST}", of, *words.split())
        assert found == pytest.approx(one, rel=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2sp", "pp2", "dp2zero"])
@pytest.mark.usefixtures("with_torch_xla")
def test_two_ranks_on_the_xla_lane(losses: Callable[..., Losses], tmp_path: Path, layout: str) -> None:
    """Processes: as one rank of the cpu lane, from its checkpoint."""
    model = ("layers=2", "family=llama")
    base, ranks = tmp_path / "base", tmp_path / "ranks"
    first = losses(base, f"steps={FIRST}", *model)
    shutil.copytree(base, ranks)
    one = losses(base, f"steps={LAST}", *model)
    traced = {"NXDT_NEMO_RUNTIME": "xla"}
    found = losses(ranks, f"steps={LAST}", *model, *LAYOUTS[layout].split(), environment=traced, seconds=420)
    assert len(found) == LAST - FIRST and found == pytest.approx(one, rel=1e-5)
    assert abs(one[0] - first[-1]) > 1e-3, "a run that learned nothing would agree with any other"


@pytest.mark.slow
def test_bf16_by_tensor_parallel_ranks(losses: Callable[..., Losses], tmp_path: Path) -> None:
    """As many steps again are the same to the bit. (What goes on from a checkpoint reads mock data from its start
    again: upstream's MockDataModule keeps no count.)"""
    words = ("family=llama", "precision=bf16", *LAYOUTS["tp2sp"].split(), "zero=True")
    whole = losses(tmp_path / "whole", f"steps={LAST}", *words)
    half = losses(tmp_path / "half", f"steps={FIRST}", *words)
    assert len(whole) == LAST and half == whole[:FIRST]
    assert whole[-1] != whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [False, True])
def test_goes_on_from_what_the_converter_wrote(losses: Callable[..., Losses], tmp_path: Path, zero: bool) -> None:
    """By way of Megatron's `torch_dist`, which keeps nothing of NeMo's: AutoResume finds weights, moments and step."""
    of = ("family=llama", f"zero={zero}")
    base, through = tmp_path / "base", tmp_path / "through"
    first = losses(base, f"steps={FIRST}", *of)
    shutil.copytree(base, through)
    straight = losses(base, f"steps={LAST}", *of)
    (saved,) = (through / "default" / "checkpoints").glob("*-last")
    convert(saved, tmp_path / "dist", "torch_dist", wanted=Target(Layout(tp=2, pp=2), kinds=KINDS))
    shutil.rmtree(saved)
    convert(tmp_path / "dist", saved, "nemo2", wanted=Target(Layout(tp=2), kinds=KINDS))
    found = losses(through, f"steps={LAST}", *of)
    assert len(found) == LAST - FIRST and found == pytest.approx(straight, rel=1e-6)
    assert abs(found[0] - first[0]) > 1e-3, "a run that began anew would agree"


@pytest.mark.slow
def test_tuning_begins_with_a_conversion_as_with_an_import(load_tool: Callable[..., Any], tmp_path: Path) -> None:
    """RestoreConfig takes weights, configuration and tokenizer of a folder that the converter wrote."""
    nemo2 = load_tool("nemo2")
    runs = nemo2.Runs(nemo2.make(tmp_path / "inputs", None), Path(), tmp_path / "runs")
    nemo2.import_model(runs, "")
    convert(runs.inputs.folder / "hf", runs.inputs.folder / "converted", "nemo2", wanted=Target(Layout(tp=2)))
    (family,) = (family for family in nemo2.FAMILIES if family.key == "tune-sft")
    words = f"{family.words} {family.first}"
    imported = runs.start(family.script, words, runs.folder / "imported").losses
    converted = runs.start(family.script, words.replace("/imported", "/converted"), runs.folder / "converted").losses
    assert len(imported) == FIRST and converted == imported
    assert abs(imported[0] - math.log(1024)) > 0.1, "a model that was not restored would agree"


@pytest.mark.slow
@pytest.mark.parametrize("key", ["tune-sft", "tune-lora"])
def test_an_imported_model_is_tuned_in_every_layout(load_tool: Callable[..., Any], tmp_path: Path, key: str) -> None:
    """Hugging Face's format to NeMo's and back, and llm.finetune between: rows of tools/nemo2.py."""
    nemo2 = load_tool("nemo2")
    runs = nemo2.Runs(nemo2.make(tmp_path / "inputs", None), Path(), tmp_path / "runs")
    nemo2.import_model(runs, "")
    assert nemo2.trip(runs).good
    (family,) = (family for family in nemo2.FAMILIES if family.key == key)
    lines = nemo2.lines_of(family, runs)
    assert len(lines) == len(family.layouts) > 5
    assert all(line.good for line in lines), [line.cells for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["tune-sft", "tune-lora"])
@pytest.mark.usefixtures("with_torch_xla")
def test_an_imported_model_is_tuned_on_the_xla_lane(
    load_tool: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """One rank goes on from the cpu lane's checkpoint (a lane draws adapters of its own), and sees a mistake."""
    nemo2 = load_tool("nemo2")
    runs = nemo2.Runs(nemo2.make(tmp_path / "inputs", None), Path(), tmp_path / "runs")
    nemo2.import_model(runs, "")
    (family,) = (family for family in nemo2.FAMILIES if family.key == key)
    wrong = next(layout.words for layout in family.layouts if layout.mistake)
    runs.start(family.script, f"{family.words} {family.first}", runs.folder / "base")

    def second_half(name: str, lane: str, more: str = "") -> Losses:
        monkeypatch.setenv("NXDT_NEMO_RUNTIME", lane)
        folder = runs.copy(runs.folder / "base", runs.folder / name)
        found: Losses = runs.start(family.script, f"{family.words} {family.then} {more}", folder).losses
        assert len(found) == LAST - FIRST
        return found

    expected = second_half("cpu", "cpu")
    assert second_half("xla", "xla") == pytest.approx(expected, rel=1e-5)
    assert second_half("wrong", "cpu", wrong) != pytest.approx(expected, rel=1e-4)
