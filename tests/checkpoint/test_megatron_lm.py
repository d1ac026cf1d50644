"""Megatron-LM's own load_checkpoint reads what we write, its distributed optimizer too: NXDT_MEGATRON_SOURCE.

Upstream loads ours and saves it again, and that holds the tensors that its first checkpoint held, all of them, to the
bit. The source is a checkout of core_v0.13.1; upstream/megatron_lm.py says what stands in for CUDA.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Target
from nxdt_nemo.checkpoint.layout import Layout

from .conftest import KINDS, assert_same, read

SOURCE = os.environ.get("NXDT_MEGATRON_SOURCE", "")
SCRIPT = Path(__file__).with_name("upstream") / "megatron_lm.py"
# The Llama of data/ll_*, and what needs no GPU.
ARGUMENTS = """
--num-layers 4 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 8 --group-query-attention
--num-query-groups 4 --seq-length 512 --max-position-embeddings 512 --normalization RMSNorm --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope --transformer-impl local
--micro-batch-size 1 --global-batch-size 4 --train-iters 10 --lr 1e-3 --use-checkpoint-opt_param-scheduler
--tokenizer-type NullTokenizer --vocab-size 5119 --distributed-backend gloo --use-cpu-initialization
--no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion
--no-bias-swiglu-fusion --attention-backend unfused --no-load-rng --save-interval 5
--hidden-dropout 0 --attention-dropout 0
"""
DISTRIBUTED = ("--use-distributed-optimizer", "--ckpt-format", "torch_dist")
TP2 = ("--tensor-model-parallel-size", "2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ranks,
    pytest.mark.upstream,
    pytest.mark.skipif(not SOURCE, reason="NXDT_MEGATRON_SOURCE names no checkout of Megatron-LM core_v0.13.1"),
]

SHARDED = ("--use-distributed-optimizer", "--ckpt-format", "torch")  # distrib_optim.pt
DISTRIB_OPTIM = {"optimizer_format": "distrib_optim"}
CASES = [  # format, layout that is written, ranks, upstream's arguments, of the writer
    ("torch_dist", Layout(tp=2), 2, (*DISTRIBUTED, *TP2), {}),
    ("torch_dist", Layout(tp=1), 2, (*DISTRIBUTED, *TP2), {}),  # resharded by upstream
    ("torch", Layout(tp=2), 2, ("--ckpt-format", "torch", *TP2), {}),
    ("torch", Layout(tp=2), 2, (*SHARDED, *TP2), DISTRIB_OPTIM),
    ("torch", Layout(tp=2), 2, (*SHARDED, *TP2, "--use-legacy-models"), {**DISTRIB_OPTIM, "spec": "legacy"}),
    ("torch", Layout(tp=1), 2, SHARDED, {**DISTRIB_OPTIM, "dp": 2}),
]


def megatron(ranks: int, steps: int, *arguments: str | Path) -> str:
    """What upstream prints."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    environment = {"NXDT_NEMO": "0", "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), SOURCE, str(steps), *ARGUMENTS.split(), *map(str, arguments)],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(("to", "layout", "ranks", "arguments", "extra"), CASES)
def test_upstream_loads_it_and_saves_the_same(
    to: str,
    layout: Layout,
    ranks: int,
    arguments: tuple[str, ...],
    extra: dict[str, Any],
    unpacked: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = unpacked("ll_torch_tp2pp2_do")
    convert(source, tmp_path / "ours", to, wanted=Target(layout, kinds=KINDS, extra=extra))
    said = megatron(ranks, 0, *arguments, "--bf16", "--load", tmp_path / "ours", "--save", tmp_path / "theirs")
    assert "loaded iteration 2, 8 samples" in said
    theirs = read(tmp_path / "theirs")
    assert assert_same(read(source), theirs) == 156
    assert theirs.training.step == 2


PP2 = ("--pipeline-model-parallel-size", "2")
PLAIN = ("--ckpt-format", "torch")
RESUMED = [  # arguments of the run that is left, of the one that goes on; format, and of the writer
    ((*TP2, *PLAIN), (*PP2, *PLAIN), "torch", {}),
    ((*TP2, *SHARDED), (*PP2, *SHARDED), "torch", DISTRIB_OPTIM),
    ((*TP2, *DISTRIBUTED), (*PP2, *DISTRIBUTED), "torch_dist", {}),
]


def losses(said: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"loss (\d+) (\d+\.\d{9})", said)}


@pytest.mark.parametrize(("before", "after", "to", "extra"), RESUMED)
def test_training_goes_on_at_another_layout(
    before: tuple[str, ...], after: tuple[str, ...], to: str, extra: dict[str, Any], tmp_path: Path
) -> None:
    """Megatron-LM trains at TP 2 and saves, its checkpoint is converted, Megatron-LM trains on at PP 2, in float32."""
    whole = losses(megatron(2, 6, *before, "--save", tmp_path / "whole"))
    first = losses(megatron(2, 3, *before, "--save", tmp_path / "half"))
    assert first == {step: whole[step] for step in (1, 2, 3)}
    convert(tmp_path / "half", tmp_path / "ours", to, wanted=Target(Layout(pp=2), kinds=KINDS, extra=extra))
    said = megatron(2, 3, *after, "--load", tmp_path / "ours", "--save", tmp_path / "rest")
    assert "loaded iteration 3, 12 samples" in said
    rest = losses(said)
    assert rest.keys() == {4, 5, 6}
    assert max(abs(rest[step] - whole[step]) for step in rest) <= 1e-5, (rest, whole)
    fresh = losses(megatron(2, 3, *after, "--save", tmp_path / "fresh"))  # the control
    assert min(abs(fresh[step] - whole[step + 3]) for step in fresh) > 1e-3
