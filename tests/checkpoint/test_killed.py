"""A conversion that is killed half-way: nothing that looks whole, and the next run goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nxdt_nemo
from nxdt_nemo.checkpoint import formats
from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Target
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.output import JOURNAL, check_manifest, digest
from nxdt_nemo.errors import UserError

from .conftest import KINDS, assert_same, files_of, kill_half_way, read, slow_writes

# The conversion, with a half-way.
SLOWLY = f"""{slow_writes(0.1)}
import sys
from pathlib import Path
from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Target
from nxdt_nemo.checkpoint.layout import Layout
kinds = ("model", "fp32_param", "exp_avg", "exp_avg_sq")
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], wanted=Target(Layout(tp=4, pp=2), kinds=kinds))
"""


@pytest.mark.parametrize("to", ["torch_dist", pytest.param("torch", marks=pytest.mark.slow)])
def test_killed_half_way(to: str, unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    source, target = unpacked("ll_td_tp2pp2"), tmp_path / "out"
    partial = tmp_path / "out.partial"
    environment = {**os.environ, "PYTHONPATH": str(Path(nxdt_nemo.__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, source, target, to], env=environment)
    kill_half_way(process, partial)
    assert not target.exists()
    with pytest.raises(UserError):  # what is there has no tracker and no metadata
        formats.read(partial, formats.Options())
    finished = len((partial / JOURNAL).read_text().splitlines()) - 1
    report = convert(source, target, to, wanted=Target(Layout(tp=4, pp=2), kinds=KINDS))
    assert 3 <= report.resumed <= finished
    assert not partial.exists() and check_manifest(target) == []
    assert_same(read(source), read(target))
    manifest = json.loads((target / "nxdt_manifest.json").read_text())
    assert set(manifest["files"]) | {"nxdt_manifest.json"} == files_of(target)
    origin = manifest["source"]["files"]
    assert len(origin) > 4
    assert all(row["digest"] == digest(Path(name), "xxh3_128") for name, row in origin.items())


def test_what_an_earlier_run_left_is_taken_only_if_it_is_of_this_plan(
    unpacked: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = unpacked("ll_td_tp2pp2"), tmp_path / "out"

    def interrupted() -> None:
        """Two files are finished, the others are not."""
        real, synced = os.fsync, []

        def sync(descriptor: int) -> None:
            synced.append(descriptor)
            if len(synced) >= 3:
                raise KeyboardInterrupt
            real(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", sync)
            with pytest.raises(KeyboardInterrupt):
                convert(source, target, "torch", wanted=Target(Layout(tp=4)), workers=1)
        assert not target.exists()

    interrupted()
    assert convert(source, target, "torch", wanted=Target(Layout(tp=4))).resumed == 2
    shutil.rmtree(target)
    interrupted()
    assert convert(source, target, "torch", wanted=Target(Layout(tp=2))).resumed == 0
    assert len(list((target / "iter_0000002").iterdir())) == 2
