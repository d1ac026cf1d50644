"""Megatron-LM's own pretrain_gpt.py, unedited, on the cpu lane: every layout against one rank.

    python tools/pretrain_gpt.py CHECKOUT            # of core_v0.13.1; writes docs/results/pretrain_gpt.md
    python tools/pretrain_gpt.py CHECKOUT --rows tp2,pp2+vpp

The script saves its first weights on one rank; each row starts from that checkpoint, with the arguments that a GPU job
would have, by torchrun. Compared are the numbers that Megatron-LM prints (seven digits of a loss, four of a gradient's
norm). Exit code 1 when a row is off, or the mistake that the last row makes on purpose is not seen.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parity_lib.sheet import Line, Sheet, heading, show
from rich.console import Console

from nxdt_nemo.testing.parity import relative

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "pretrain_gpt.md"
STEPS = 10
VOCABULARY = 4096
COLUMNS = ("model", "row", "ranks", "arguments", "loss", "grad norm", "tolerance", "s", "verdict")

COMMON = f"""
--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
--micro-batch-size 1 --global-batch-size 4 --train-iters {STEPS} --lr 2e-3 --lr-warmup-iters 2
--lr-decay-style constant --mock-data --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1}
--eval-iters 1 --eval-interval {STEPS} --log-interval 1 --attention-dropout 0 --hidden-dropout 0
--ckpt-format torch_dist
"""
MODELS = {
    "gpt": "",
    "llama": """--swiglu --normalization RMSNorm --position-embedding-type rope --group-query-attention
        --num-query-groups 2 --untie-embeddings-and-output-weights --disable-bias-linear""",
    "moe": """--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss
        --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0 --disable-bias-linear""",
}
TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
LOSS, NORM = 1e-6, 2e-3  # a digit of what is printed
_STEP = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+) \|.*?grad norm: (\S+) \|")


@dataclass(frozen=True)
class Row:
    """A run of the script. `lr`: another rate, which has to be seen."""

    model: str
    name: str
    ranks: int
    arguments: str
    tensor: int = 1
    lr: str = ""

    @property
    def key(self) -> str:
        """As --rows has it."""
        return self.name if self.model == "gpt" else f"{self.model}-{self.name}"


ROWS = (
    Row("gpt", "tp2", 2, TP2, 2),
    Row("gpt", "tp2+sp", 2, f"{TP2} --sequence-parallel", 2),
    Row("gpt", "pp2", 2, PP2),
    Row("gpt", "pp2+vpp", 2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    Row("gpt", "cp2", 2, "--context-parallel-size 2"),
    Row("gpt", "dp2+zero", 2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    Row("gpt", "full recompute", 1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    Row("llama", "tp2+sp dp2+zero", 4, f"{TP2} --sequence-parallel --use-distributed-optimizer", 2),
    Row("llama", "tp2 pp2", 4, f"{TP2} {PP2}", 2),
    Row("moe", "ep2", 2, "--expert-model-parallel-size 2"),
    Row("gpt", "a rate 1 % higher", 1, "", lr="2.02e-3"),
)


@dataclass(frozen=True)
class Curve:
    """What a run printed: a loss and a norm for each step, in words as printed, and how long it took."""

    losses: list[str]
    norms: list[str]
    seconds: float


class Runs:
    """Runs of the script in a checkout; each model's weights and its curve on one rank are made once."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.checkout, self.folder = checkout, folder
        self._alone: dict[str, Curve] = {}

    def start(self, model: str, ranks: int, words: str, tensor: int = 1) -> Curve:
        """Run it with these arguments. Raises RuntimeError with the last lines of a run that failed."""
        padded = f"--make-vocab-size-divisible-by {VOCABULARY // tensor}"  # the same number of rows in all layouts
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["pretrain_gpt.py", *f"{COMMON} {MODELS[model]} {padded} {words}".split()]
        environ = os.environ | {"NXDT_NEMO": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
        began = time.monotonic()
        done = subprocess.run(command, cwd=self.checkout, env=environ, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        found = _STEP.findall(said)
        if done.returncode or not found:
            raise RuntimeError(f"{model} {words}: exit code {done.returncode}\n" + "\n".join(said.splitlines()[-25:]))
        return Curve([loss for _, loss, _ in found], [norm for *_, norm in found], time.monotonic() - began)

    def begin(self, model: str) -> str:
        """The arguments that start from this model's first weights."""
        weights = self.folder / model
        if not weights.exists():
            self.start(model, 1, f"--lr 1e-12 --lr-warmup-iters 0 --exit-interval 1 --save-interval 1 --save {weights}")
        return f"--load {weights} --finetune --no-load-optim --no-load-rng"

    def alone(self, model: str) -> Curve:
        """The curve of one rank."""
        if model not in self._alone:
            self._alone[model] = self.start(model, 1, self.begin(model))
        return self._alone[model]

    def resumed(self, ranks: int, words: str, tensor: int, half: int) -> tuple[Curve, Curve]:
        """A whole run, and the rest of one that was ended after `half` steps and started again, with its optimizer."""
        whole = self.start("gpt", ranks, f"{words} {self.begin('gpt')}", tensor)
        kept = self.folder / "kept"
        stop = f"--save {kept} --save-interval {half} --exit-interval {half}"
        self.start("gpt", ranks, f"{words} {self.begin('gpt')} {stop}", tensor)
        return whole, self.start("gpt", ranks, f"{words} --load {kept}", tensor)


def difference(found: Sequence[str], expected: Sequence[str]) -> float:
    """The worst relative difference, of the last steps, as many as `found` has; infinite as `relative`'s."""
    return relative([float(one) for one in found], [float(other) for other in expected[-len(found) :]])


def line(row: Row, runs: Runs) -> Line:
    """Run a row beside one rank."""
    rate = f"--lr {row.lr}" if row.lr else ""
    found = runs.start(row.model, row.ranks, f"{row.arguments} {runs.begin(row.model)} {rate}", row.tensor)
    expected = runs.alone(row.model)
    loss, norm = difference(found.losses, expected.losses), difference(found.norms, expected.norms)
    equal = len(found.losses) == STEPS and loss <= LOSS and norm <= NORM
    good = (math.isfinite(loss) and not equal) if row.lr else equal
    verdict = ("seen" if good else "NOT SEEN") if row.lr else ("green" if good else "RED")
    cells = [row.model, row.name, str(row.ranks), f"`{row.arguments or rate}`", f"{loss:.1e}", f"{norm:.1e}"]
    return Line([*cells, f"{LOSS:.0e}, {NORM:.0e}", f"{found.seconds:.0f}", verdict], good)


def resume(runs: Runs) -> Line:
    """The second half of a run that was ended and started again."""
    words = f"{TP2} --sequence-parallel --use-distributed-optimizer"
    whole, rest = runs.resumed(4, words, 2, STEPS // 2)
    loss, norm = difference(rest.losses, whole.losses), difference(rest.norms, whole.norms)
    equal = len(rest.losses) == STEPS // 2 and loss == 0.0 and norm == 0.0
    cells = ["gpt", "resumed, tp2+sp dp2+zero", "4", f"`{words}`", f"{loss:.1e}", f"{norm:.1e}", "0"]
    return Line([*cells, f"{rest.seconds:.0f}", "green" if equal else "RED"], equal)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a folder with pretrain_gpt.py of Megatron-LM core_v0.13.1")
    parser.add_argument("--rows", help=f"some of: {', '.join(row.key for row in ROWS)}, resume".replace("%", "%%"))
    asked = parser.parse_args(arguments)
    if not (asked.checkout / "pretrain_gpt.py").is_file():
        parser.error(f"{asked.checkout} has no pretrain_gpt.py")
    wanted = None if asked.rows is None else set(asked.rows.split(","))
    sheet = Sheet("pretrain_gpt.py", COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(asked.checkout.resolve(), Path(folder))
        for row in ROWS:
            if wanted is None or row.key in wanted:
                print(f"{row.key} ...", file=sys.stderr, flush=True)
                sheet.lines.append(line(row, runs))
        if wanted is None or "resume" in wanted:
            sheet.lines.append(resume(runs))
    show([sheet], Console())
    if wanted is None:
        RESULT.write_text(page(sheet))
    return 0 if sheet.good else 1


def page(sheet: Sheet) -> str:
    """The table, and how to read it."""
    return f"""\
# Megatron-LM's pretrain_gpt.py, unedited

{heading("python tools/pretrain_gpt.py CHECKOUT")}
The script and its package are a checkout of core_v0.13.1, started by torchrun with `NXDT_NEMO=1`; its arguments are
those of a GPU job: no option chooses a backend, an implementation or a kernel. {STEPS} steps in float32 from one
checkpoint in Megatron's own format; "loss" and "grad norm" are the largest relative difference to one rank among the
numbers that are printed (seven and four digits).

{sheet.markdown}
"""


if __name__ == "__main__":
    sys.exit(main())
