"""`nxdt-nemo patches`: what it prints and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner, Result

from nxdt_nemo.cli.patches import app
from nxdt_nemo.errors import UserError

if TYPE_CHECKING:
    from conftest import Upstream

RECORD = """
[run]
target = "fakeup.module.run"
kind = "replace"
replacement = "ours:run"
versions = "fakeup-dist>=1.2,<1.3"
fingerprint = "{digest}"
why = "Upstream's needs CUDA."
remove_when = "It does not."
"""


@pytest.fixture
def folder(upstream: Upstream, tmp_path: Path) -> Path:
    upstream.write("fakeup.module", "import cuda\n\ndef run(a):\n    return a\n")
    upstream.write("ours", "def run(a): return a\n")
    records = tmp_path / "records"
    records.mkdir()
    (records / "fake.toml").write_text(RECORD.format(digest=upstream.fingerprint("fakeup.module.run")))
    return records


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_list(folder: Path) -> None:
    (record,) = json.loads(call("list", "--json", "--folder", folder).stdout)
    assert (record["id"], record["file"], record["lanes"]) == ("run", "fake.toml", ["cpu", "xla", "neuron"])
    shown = call("list", "--folder", folder)
    assert shown.exit_code == 0
    assert "1 patches" in shown.stdout
    assert "fakeup.module.run" in shown.stdout


def test_count(folder: Path) -> None:
    assert call("count", "--folder", folder).stdout == "1 patches (fake 1, replace 1)\n"
    assert json.loads(call("count", "--json", "--folder", folder).stdout) == {
        "total": 1,
        "by_file": {"fake": 1},
        "by_kind": {"replace": 1},
    }


def test_verify_exits_1_on_drift_and_only_then(folder: Path, upstream: Upstream) -> None:
    good = call("verify", "--static-only", "--folder", folder)
    assert (good.exit_code, "1 patches, 0 drifted" in good.stdout) == (0, True)
    upstream.write("fakeup.module", "def run(a):\n    return -a\n")
    bad = call("verify", "--static-only", "--folder", folder)
    assert (bad.exit_code, "1 patches, 1 drifted" in bad.stdout) == (1, True)
    assert "DRIFT: the source changed" in bad.stdout
    result = call("verify", "--static-only", "--json", "--folder", folder)
    (row,) = json.loads(result.stdout)
    assert (result.exit_code, row["ok"], row["static"]["ok"], row["live"]["ok"]) == (1, False, False, None)


def test_verify_against_another_release(folder: Path, tmp_path: Path) -> None:
    assert "fakeup-dist is not installed" in call("verify", "--json", "--against", tmp_path, "--folder", folder).stdout
    missing = call("verify", "--against", tmp_path / "gone", "--folder", folder)
    assert isinstance(missing.exception, UserError)


@pytest.mark.parametrize("name", ["run", "fakeup.module.run"])
def test_explain_shows_the_record_and_upstreams_code(folder: Path, upstream: Upstream, name: str) -> None:
    shown = call("explain", name, "--folder", folder).stdout
    assert "Upstream's needs CUDA." in shown
    assert f"{upstream.root / 'fakeup/module.py'}:3\n    def run(a):\n        return a\n" in shown


def test_explain_of_nothing_suggests(folder: Path) -> None:
    error = call("explain", "fakeup.modul.run", "--folder", folder).exception
    assert isinstance(error, UserError)
    assert str(error) == "fakeup.modul.run: no record has this target or id; did you mean fakeup.module.run?"


def test_fingerprint_prints_the_line_of_a_record(folder: Path, upstream: Upstream) -> None:
    shown = call("fingerprint", "fakeup.module.run")
    assert shown.stdout == f'fingerprint = "{upstream.fingerprint("fakeup.module.run")}"\n'
    assert shown.stdout.strip() in (folder / "fake.toml").read_text()


def test_a_bad_record_is_one_line_and_exit_1(folder: Path) -> None:
    (folder / "fake.toml").write_text("[run]\nkindd = 'x'\n")
    shown = call("list", "--folder", folder)
    assert shown.exit_code == 1
    assert shown.stderr == "nxdt-nemo: fake.toml [run]: unknown key kindd; did you mean kind?\n"


def test_the_commands_load_no_torch() -> None:
    code = (
        "import sys\nfrom nxdt_nemo.cli.patches import app\n"
        "try: app(['verify', '--static-only'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'nemo', 'megatron', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
