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
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Target
from nxdt_nemo.checkpoint.layout import Layout

from .conftest import KINDS, assert_same, read, tensor

SOURCE = os.environ.get("NXDT_MEGATRON_SOURCE", "")
SCRIPT = Path(__file__).with_name("upstream") / "megatron_lm.py"
COMMON = """
--transformer-impl local --micro-batch-size 1 --global-batch-size 4 --train-iters 10 --lr 1e-3
--use-checkpoint-opt_param-scheduler --tokenizer-type NullTokenizer --distributed-backend gloo
--use-cpu-initialization --no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion
--attention-backend unfused --no-load-rng --save-interval 5 --hidden-dropout 0 --attention-dropout 0
"""
# The Llama of data/ll_*, and what needs no GPU.
ARGUMENTS = f"""
--num-layers 4 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 8 --group-query-attention
--num-query-groups 4 --seq-length 512 --max-position-embeddings 512 --normalization RMSNorm --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
--vocab-size 5119 --no-rope-fusion --no-bias-swiglu-fusion {COMMON}
"""
# pretrain_t5.py's model.
T5 = f"""
--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 16 --decoder-seq-length 16
--max-position-embeddings 16 --vocab-size 255 --no-bias-gelu-fusion --ckpt-format torch {COMMON}
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


def megatron(ranks: int, steps: int, *arguments: str | Path, model: str = ARGUMENTS) -> str:
    """What upstream prints."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    environment = {"NXDT_NEMO": "0", "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), SOURCE, str(steps), *model.split(), *map(str, arguments)],
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


@pytest.mark.parametrize("optimizer", [(), ("--use-distributed-optimizer",)])
def test_zarr_holds_the_optimizer_too(optimizer: tuple[str, ...], tmp_path: Path) -> None:
    """Of a run that is saved twice, by megatron-core's zarr backend and as torch_dist."""
    for form in ("zarr", "torch_dist"):
        megatron(2, 2, *TP2, "--bf16", *optimizer, "--ckpt-format", form, "--save", tmp_path / form)
    convert(tmp_path / "zarr", tmp_path / "ours", "torch_dist", wanted=Target(Layout(pp=2), kinds=KINDS))
    for ours in ("zarr", "ours"):
        assert assert_same(read(tmp_path / "torch_dist"), read(tmp_path / ours)) == 156
        assert read(tmp_path / ours).training.step == 2


# Not clipped: upstream counts the gradients of embeddings twice in the norm of a T5's stages, and its distributed
# optimizer clips either side by the norm of that side alone.
UNCLIPPED = ("--clip-grad", "0")
SIDES = [  # tensor-parallel size, stages of the encoder, of the decoder; arguments of the optimizer
    (1, 2, 2, UNCLIPPED),
    (2, 1, 1, UNCLIPPED),
    (1, 2, 1, (*UNCLIPPED, "--use-distributed-optimizer")),
    (1, 1, 2, (*UNCLIPPED, "--use-distributed-optimizer")),
]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """t5(*arguments): one that Megatron-LM trains on one rank: its losses, and folders after three steps and six."""

    @cache
    def train(*arguments: str) -> Any:
        folder = tmp_path_factory.mktemp("t5")
        whole = losses(megatron(1, 6, *arguments, "--save", folder / "whole", model=T5))
        megatron(1, 3, *arguments, "--save", folder / "half", model=T5)
        return SimpleNamespace(losses=whole, half=folder / "half", whole=folder / "whole")

    return train


@pytest.mark.parametrize(("tp", "encoder", "decoder", "optimizer"), SIDES)
def test_a_t5_goes_on_in_stages(
    tp: int, encoder: int, decoder: int, optimizer: tuple[str, ...], t5: Callable[..., Any], tmp_path: Path
) -> None:
    """Cut into stages by a conversion, loaded and trained on by Megatron-LM, and read from there, in float32."""
    trained = t5(*optimizer)
    sharded = optimizer != UNCLIPPED
    extra = {"encoder_pp": encoder, **(DISTRIB_OPTIM if sharded else {})}
    layout = Layout(tp=tp, pp=encoder + decoder)
    convert(trained.half, tmp_path / "ours", "torch", wanted=Target(layout, kinds=KINDS, extra=extra))
    sizes = f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {decoder}"
    arguments = (*optimizer, *sizes.split(), f"--encoder-pipeline-model-parallel-size={encoder}", "--load")

    def run(steps: int, save: str) -> str:
        return megatron(tp * layout.pp, steps, *arguments, tmp_path / "ours", "--save", tmp_path / save, model=T5)

    assert "loaded iteration 3, 12 samples" in run(0, "same")
    kinds = [kind for kind in KINDS if sharded or kind != "fp32_param"]
    assert assert_same(read(trained.half), read(tmp_path / "same"), tuple(kinds)) > 200
    rest = losses(run(3, "rest"))
    assert rest.keys() == {4, 5, 6}
    assert max(abs(rest[step] - trained.losses[step]) for step in rest) <= 1e-5, (rest, trained.losses)
    assert min(abs(rest[step] - trained.losses[step - 3]) for step in rest) > 1e-3  # as if nothing were loaded
    convert(tmp_path / "rest", tmp_path / "back", "torch_dist", wanted=Target(kinds=KINDS))
    found, wanted = read(tmp_path / "back"), read(trained.whole)
    names = wanted.catalog.names()
    off = [float((tensor(found, "model", name) - tensor(wanted, "model", name)).abs().max()) for name in names]
    assert max(off) <= 1e-5
