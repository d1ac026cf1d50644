"""T5: what stock megatron-core saved goes through other layouts and formats, and computes the same there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Target
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.errors import UserError

from .conftest import assert_same, read

KINDS = ("model", "exp_avg", "exp_avg_sq")  # float32 weights are their own main parameters
SCRIPT = Path(__file__).with_name("upstream") / "t5.py"


def upstream(what: str, folder: Path, out: Path, case: tuple[str, str], ranks: int = 1) -> torch.Tensor:
    """Logits [2, 12, 256] by stock megatron-core; weights where positions are relative."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    environment = {**os.environ, "NXDT_NEMO": "0", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), what, str(folder), str(out), *case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: torch.Tensor = torch.load(out, weights_only=True)
    return found


ROUTES: list[tuple[str, Layout, dict[str, Any]]] = [
    ("torch_dist", Layout(tp=2), {}),
    ("torch", Layout(tp=2), {}),
    ("torch", Layout(tp=4), {"spec": "te"}),
    ("nemo", Layout(tp=2), {}),
    ("nemo2", Layout(tp=2), {}),
    ("nemo_dist", Layout(tp=1), {}),
]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("case", [("relative", "tied"), ("learned_absolute", "untied")])
def test_upstreams_model_through_every_format(case: tuple[str, str], tmp_path: Path) -> None:
    wanted = upstream("make", tmp_path / "stock", tmp_path / "logits.pt", case)
    first = read(tmp_path / "stock/dist", optimizer=False)
    assert (first.family.name, first.model.layers, first.model.decoder_layers) == ("t5", 3, 2)
    assert first.model.relative_buckets == (32 if case[0] == "relative" else 0)
    count = assert_same(first, read(tmp_path / "stock/torch", optimizer=False), ("model",))
    assert count == len(first.catalog.names())
    for number, (to, layout, extra) in enumerate(ROUTES):
        there, back = tmp_path / f"{number}", tmp_path / f"{number}.back"
        convert(tmp_path / "stock/torch", there, to, wanted=Target(layout, extra=extra))
        assert assert_same(first, read(there, optimizer=False), ("model",)) == count
        convert(there, back, "torch_dist")
        assert assert_same(first, read(back, optimizer=False), ("model",)) == count
    found = {
        name: upstream("load", tmp_path / place, tmp_path / f"{name}.pt", case, ranks)
        for name, place, ranks in (
            ("torch_dist", "0/iter_0000002", 1),
            ("torch_dist, TP 2", "0/iter_0000002", 2),
            ("torch, TP 2", "1/iter_0000002", 2),
            ("back from nemo", "3.back/release", 1),
        )
    }
    for name, values in found.items():
        if case[0] == "relative" and "TP 2" in name:  # a rank's weights, which were loaded strictly
            assert len(values) < len(wanted)
            continue
        assert float((values - wanted).abs().max()) <= 1e-5, name


def test_stages_that_upstream_saved(unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    """Two of the encoder, one of the decoder, with upstream's distributed optimizer: rank by rank, and one stage."""
    folder = unpacked("t5_torch_e2d1_do")
    source = read(folder)
    assert (source.layout.pp, source.layout.encoder, source.model.layers, source.model.decoder_layers) == (3, 2, 2, 2)
    extra = {"optimizer_format": "distrib_optim", "encoder_pp": 2}
    convert(folder, tmp_path / "again", "torch", wanted=Target(source.layout, kinds=KINDS, extra=extra))
    for stage in range(3):
        name = f"iter_0000002/mp_rank_00_{stage:03d}/distrib_optim.pt"
        (mine,), (theirs,) = (torch.load(at / name)[0].values() for at in (tmp_path / "again", folder))
        assert mine["numel_unpadded"] == theirs["numel_unpadded"]
        if stage != 1:  # the encoder's last stage has an output layer that nothing uses
            assert all(torch.equal(mine[kind], theirs[kind]) for kind in ("param", "exp_avg", "exp_avg_sq"))
    convert(folder, tmp_path / "whole", "torch", wanted=Target(kinds=KINDS))
    convert(tmp_path / "whole", tmp_path / "back", "torch", wanted=Target(Layout(pp=4), kinds=KINDS))
    for wrong in ("one", 0):
        with pytest.raises(UserError, match=f"encoder_pp={wrong} is no number of stages"):
            convert(folder, tmp_path / "none", "torch", wanted=Target(Layout(pp=2), extra={"encoder_pp": wrong}))
    for place in ("again", "whole", "back"):
        assert assert_same(source, read(tmp_path / place), KINDS) == 3 * len(source.catalog.names())


def test_what_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    from nxdt_nemo.checkpoint.dialects.megatron_core import PER_RANK
    from nxdt_nemo.checkpoint.families import by_name
    from nxdt_nemo.checkpoint.model import Model
    from nxdt_nemo.checkpoint.placement import rows_of

    family = by_name("t5")
    model = Model("t5", 2, 8, 2, 2, 4, 16, 32, 8, decoder_layers=2, relative_buckets=8, tied=True)
    for layout, fix in ((Layout(pp=2), "use pp=1, torch, or torch_dist"), (Layout(pp=2, encoder=1), "use pp=1")):
        with pytest.raises(UserError, match=fix):
            list(rows_of(PER_RANK, model, family.names(model), layout.shard(2, 0, 0, 0, 0, ()), layout))
    for layout, fix in (
        (Layout(pp=2, encoder=2), "correct encoder_pp"),
        (Layout(pp=2, vpp=2, encoder=1), "leave out --vpp and --stages"),
        (Layout(pp=4, encoder=1), "use divisors for both"),
    ):
        with pytest.raises(UserError, match=fix):
            layout.check(model.layers, model.experts, model.decoder_layers)
    with pytest.raises(UserError, match="use torch_dist, torch or nemo"):
        family.to_hf(model)
