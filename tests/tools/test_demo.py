"""The pieces of `make demo`, and, marked slow, the demo itself with a few steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

import demo  # noqa: E402
from demo_lib.corpus import documents, prose, write_corpus  # noqa: E402
from demo_lib.curves import event_files, read_scalars, save_picture, terminal_plot  # noqa: E402
from demo_lib.report import loss_rows, markdown, speed, table  # noqa: E402
from demo_lib.runs import ChildError, child_environment, run_child  # noqa: E402
from demo_lib.tokens import VOCAB_SIZE  # noqa: E402

# --- corpus -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return documents()


def test_corpus_is_the_same_in_another_process(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from demo_lib.corpus import *; write_corpus(Path({str(tmp_path / 'b')!r}))"
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(TOOLS)}
    write_corpus(tmp_path / "a")
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_corpus_is_large_and_without_duplicates(texts: list[str]) -> None:
    assert sum(len(text) for text in texts) >= 500_000
    assert len(set(texts)) == len(texts) > 1000


def test_corpus_reads_like_english(texts: list[str]) -> None:
    words = re.findall(r"[A-Za-z]+", " ".join(texts).lower())
    frequent = sum(word in {"the", "of", "a", "an", "to", "is", "and", "in", "that", "be"} for word in words)
    assert frequent / len(words) > 0.2  # English prose has about a quarter
    assert not any(line.startswith(">>>") for text in texts for line in text.split("\n"))


def test_prose_keeps_paragraphs_and_drops_code() -> None:
    text = """Count the items of a list and return that number.

        x = f(y[0], **z) + {1: 2}; print(x, y, z, file=f); del x

        The result is never negative, and zero for
        an empty list.
        """
    assert prose(text) == (
        "Count the items of a list and return that number.\nThe result is never negative, and zero for an empty list."
    )


# --- tokenizer and index ------------------------------------------------------------------------------

_READ_BACK = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
data = IndexedDataset(sys.argv[1])
rows = [data[i].tolist() for i in range(len(data))]
print("\\n" + json.dumps({"documents": len(data.document_indices) - 1, "rows": rows}))
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus, tokenizer.model and the index, made as the demo makes them."""
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "corpus.jsonl")
    run_child(
        "tokenizing", [sys.executable, TOOLS / "demo_lib/tokens.py", folder / "corpus.jsonl", folder], folder / "log"
    )
    return folder


def test_tokenizer_gives_the_text_back(prepared: Path, texts: list[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))
    assert (model.vocab_size(), model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (
        (VOCAB_SIZE, 0, 1, 2, 3)
    )
    for text in texts[::100]:
        ids = model.encode(text)
        assert model.decode(ids).split() == text.split()
        assert len(ids) < len(text) / 2  # it learnt more than letters


def test_index_holds_every_document_and_ends_it_with_eos(prepared: Path, texts: list[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))
    command = [sys.executable, "-c", _READ_BACK, str(prepared / "corpus_text_document")]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=child_environment()).stdout
    read = json.loads(output.splitlines()[-1])
    assert read["documents"] == len(read["rows"]) == len(texts)
    assert [row[-1] for row in read["rows"]] == [model.eos_id()] * len(texts)
    assert model.decode(read["rows"][0][:-1]).split() == texts[0].split()
    counts = json.loads((prepared / "tokens.json").read_text())
    assert counts == {"documents": len(texts), "tokens": sum(map(len, read["rows"]))}


# --- curves -------------------------------------------------------------------------------------------


def _write_events(folder: Path, losses: dict[int, tuple[int, float]], wall_time: float) -> None:
    """An event file as NeMo's logger writes it. losses: x -> (global_step, loss)."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder), filename_suffix=f".{wall_time:.0f}")
    for x, (global_step, loss) in losses.items():
        for tag, value in (("loss", loss), ("global_step", global_step)):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=x, wall_time=wall_time, summary=summary))
    writer.close()


def test_scalars_of_a_resumed_run_continue_the_first(tmp_path: Path) -> None:
    _write_events(tmp_path / "z", {0: (0, 4.0), 1: (1, 3.0), 2: (2, 9.0)}, wall_time=100)
    # Read first, but written later; and resumed after two steps, x falls one behind.
    _write_events(tmp_path / "a", {1: (2, 2.0), 2: (3, 1.0)}, wall_time=200)
    assert len(event_files(tmp_path)) == 2
    assert read_scalars(event_files(tmp_path))["loss"] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]


def _plain(lines: list[str]) -> list[str]:
    return [Text.from_markup(line).plain for line in lines]


def test_plot_of_a_falling_curve_goes_from_top_left_to_bottom_right() -> None:
    lines = _plain(terminal_plot({"loss": [(step, 10.0 - step) for step in range(11)]}, width=40, rows=6))
    assert len(lines) == 6 + 2
    assert max(map(len, lines)) <= 40
    ink = [[x for x, c in enumerate(line) if "\u2801" <= c <= "\u28ff"] for line in lines[:6]]
    assert all(ink), "a row without ink: the curve is broken"
    assert ink[0][0] == 9
    assert ink[-1][-1] == max(map(len, lines)) - 1
    assert [row[0] for row in ink] == sorted(row[0] for row in ink)
    assert lines[0].strip().startswith("10.00")
    assert lines[5].strip().startswith("0.00")
    assert lines[6].split() == ["0", "10"]


def test_plot_marks_the_resume_and_names_the_curves() -> None:
    curves = {"train": [(1, 5.0), (100, 1.0)], "validation": [(20, 4.5), (100, 1.5)]}
    lines = _plain(terminal_plot(curves, mark=60))
    assert lines[0][9 + 37] == "┊"  # step 60 lies 59/99 of the way along 63 columns
    assert lines[-2].split() == ["1", "60", "100"]
    assert lines[-1].split() == ["━━", "train", "━━", "validation", "┊", "resumed"]


def test_plot_of_a_flat_or_single_point_does_not_divide_by_zero() -> None:
    assert len(terminal_plot({"loss": [(5, 2.0)]})) == 14
    assert len(terminal_plot({"loss": [(1, 2.0), (9, 2.0)]}, mark=5)) == 14


def test_plot_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        terminal_plot({"loss": []})


def test_picture_is_a_small_png(tmp_path: Path) -> None:
    save_picture({"train": [(i, 7.0 / (i + 1)) for i in range(120)]}, tmp_path / "p.png", title="t", mark=80)
    data = (tmp_path / "p.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 60_000


# --- report -------------------------------------------------------------------------------------------


def test_table_shows_values_literally() -> None:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    rows = loss_rows([(1, 7.62), (120, 4.5)], [(20, 6.1), (120, 4.75)])
    console.print(table([*rows, ("data", "[1.0,/a/b]")]))
    text = console.export_text()
    assert "7.620 (step 1) → 4.500 (step 120)" in text
    assert "6.100 (step 20) → 4.750 (step 120)" in text
    assert "[1.0,/a/b]" in text


def test_missing_losses_are_an_error_not_an_empty_table() -> None:
    with pytest.raises(ValueError, match="no validation loss"):
        loss_rows([(1, 7.0)], [])


def test_speed_is_of_the_median_step() -> None:
    assert speed([(1, 30.0), (2, 0.5), (3, 0.5)], 2048) == 4096


def test_page_holds_the_rows_and_the_generated_words() -> None:
    page = markdown(
        [("lane", "cpu | gloo")], [{"prompt": "The", "text": "The end"}], command="make demo", picture="p.png"
    )
    assert "| lane | cpu &#124; gloo |" in page
    assert "**The** end" in page
    assert "![loss curve](p.png)" in page
    assert "torch 2." in page


# --- children -----------------------------------------------------------------------------------------


def test_a_failing_child_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    code = "for i in range(100): print('line', i)\nraise SystemExit(3)"
    with pytest.raises(ChildError, match="training: exit status 3") as caught:
        run_child("training", [sys.executable, "-c", code], tmp_path / "log")
    assert caught.value.tail == [f"line {i}" for i in range(70, 100)]
    assert str(tmp_path / "log") in str(caught.value)


def test_a_child_over_its_limit_is_ended_with_its_own_children(tmp_path: Path) -> None:
    code = "import subprocess as s; p = s.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    with pytest.raises(ChildError, match="still running after 2 s"):
        run_child("training", [sys.executable, "-c", code], tmp_path / "log", every=0.2, limit=2)
    grandchild = Path("/proc") / (tmp_path / "log").read_text().strip()
    for _ in range(50):  # killed; an init that reaps slowly may still list it as a zombie
        if not grandchild.exists() or "\nState:\tZ" in (grandchild / "status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the grandchild outlived run_child")


def test_a_child_is_killed_as_soon_as_the_caller_has_seen_enough(tmp_path: Path) -> None:
    code = "import time; print('ready', flush=True); time.sleep(600)"
    seen = lambda: "ready" in (tmp_path / "log").read_text()  # noqa: E731
    assert run_child("training", [sys.executable, "-c", code], tmp_path / "log", tick=seen, every=0.1) < 60


def test_children_cannot_reach_a_model_hub() -> None:
    assert child_environment()["HF_HUB_OFFLINE"] == "1"
    assert child_environment()["OMP_NUM_THREADS"] == "1"


# --- the demo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "plan"), [(120, (120, 80, 20)), (6, (6, 4, 1)), (1, (6, 4, 1)), (100, (96, 64, 16))])
def test_the_first_run_ends_on_a_validation(tmp_path: Path, steps: int, plan: tuple[int, int, int]) -> None:
    made = demo.make_plan(tmp_path, steps)
    assert (made.steps, made.stop, made.validate) == plan


def test_odd_paths_reach_nemo_as_they_are(tmp_path: Path) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    folder = tmp_path / "it's a, b=c"
    words = [str(word) for word in demo.nemo_command(Path("s.py"), demo.make_plan(folder, 6))]
    parsed = OverridesParser.create().parse_overrides([word for word in words if word.startswith(("model", "exp"))])
    values = {override.key_or_group: override.value() for override in parsed}
    assert values["exp_manager.explicit_log_dir"] == str(folder / "run" / "train")
    assert values["model.data.data_prefix"] == [str(folder / "data" / "corpus_text_document")]


def test_repeated_steps_are_compared(tmp_path: Path) -> None:
    first = demo.Run(tmp_path, {"reduced_train_loss": [(1, 5.0), (2, 4.0), (3, 3.0)]})
    second = demo.Run(tmp_path, {"reduced_train_loss": [(2, 4.0), (3, 3.5), (4, 2.0)]})
    assert demo.repeated(first, second) == "killed at step 3, resumed at 2; repeated losses NOT equal, by up to 5.0e-01"
    assert demo.repeated(first, first) == "killed at step 3, resumed at 1; repeated losses equal to the bit"


def test_the_newest_last_checkpoint_is_found_by_its_step(tmp_path: Path) -> None:
    plan = demo.make_plan(tmp_path, 120)
    for name in ("m-step=80-last", "m-step=120-last", "m-step=121-last.incomplete", "m-step=9-last"):
        (plan.run / "train" / "checkpoints" / name).mkdir(parents=True)
    assert demo.last_checkpoint(plan).name == "m-step=120-last"


def test_a_failed_training_ends_the_demo_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "prepare_data", lambda plan, stages: {"documents": 1, "tokens": 1, "bytes": 1})
    command = [sys.executable, "-c", "raise RuntimeError('no such [lane]')"]
    monkeypatch.setattr(demo, "nemo_command", lambda *_: command)
    assert demo.main(["--folder", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "RuntimeError: no such [lane]" in output
    assert "train-from-0.log" in output.replace("\n", "")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_trains_resumes_and_talks(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "demo.py"), "--steps", "24", "--folder", str(tmp_path / "demo")]
    done = subprocess.run([*command, "--results", str(tmp_path / "results")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    scalars = read_scalars(event_files(tmp_path / "demo" / "run"))
    losses = dict(scalars["reduced_train_loss"])
    assert sorted(losses) == list(range(1, 25)), "a step is missing or the resume started anew"
    assert losses[24] < losses[1] - 0.5
    validation = [loss for _, loss in scalars["val_loss"]]
    assert len(validation) == 6
    assert validation[-1] < validation[0] - 0.3
    page = (tmp_path / "results" / "demo.md").read_text()
    assert "repeated losses equal to the bit" in page
    assert all(prompt in page for prompt in demo.PROMPTS)
    assert (tmp_path / "results" / "demo_loss.png").stat().st_size < 60_000
