"""NeMo's scripts/performance/llm, unedited: each writes its Slurm job, and the job's own command trains.

    python tools/performance.py SDIST SITE                   # writes docs/results/performance.md
    python tools/performance.py SDIST SITE --rows mixtral    # some rows; prints only

SDIST is the unpacked source distribution of nemo_toolkit 2.4.1, SITE a folder with nemo_run 0.5.0, whose SlurmExecutor
has what these scripts say to it (0.4.0, which is locked, has not) and which wants ray, leptonai and fastapi:
`pip install --target SITE nemo_run==0.5.0 leptonai==0.25.0`, less what is installed. In place of sbatch stands a
command that prints a number. What the job hands to its ranks gets small sizes (nemo2_lib/smaller_task.py), and is
then run as the job has it, by torchrun in place of srun. Exit code 1 when a row does not train.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nemo2_lib.runs import LOSS
from parity_lib.sheet import Line, Sheet, heading, show
from rich.console import Console

from nxdt_nemo.testing.script_run import OURS, run

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "performance.md"
SMALLER = Path(__file__).parent / "nemo2_lib" / "smaller_task.py"
SECONDS = 400
COLUMNS = ("script", "arguments", "ranks", "losses of three steps", "verdict")
ONE = "-tp 1 -pp 1 -ep 1 -gb 2"


@dataclass(frozen=True)
class Row:
    """A script of scripts/performance/llm, and what is said to it beside the cluster."""

    script: str
    words: str = ONE
    ranks: int = 1


ROWS = (
    Row("pretrain_llama3_8b", "-tp 2 -pp 1 -ep 1 -gb 4", 2),
    Row("pretrain_llama3_70b", "-tp 1 -pp 2 -ep 1 -gb 4", 2),
    Row("pretrain_mixtral_8x7b", "-tp 1 -pp 1 -ep 2 -gb 4", 2),
    Row("pretrain_qwen3_30b_a3b"),
    Row("pretrain_nemotron3_8b"),
    Row("pretrain_nemotron4_15b"),
)


class Failed(Exception):
    """A command that did not end well, or trained nothing."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sdist", type=Path)
    parser.add_argument("site", type=Path)
    parser.add_argument("--rows", nargs="+", default=[], help="words in the names of the rows to run")
    args = parser.parse_args()
    sheet = Sheet("NeMo's performance scripts", COLUMNS)
    for row in ROWS:
        if not args.rows or any(word in row.script for word in args.rows):
            with tempfile.TemporaryDirectory() as folder:
                sheet.lines.append(line(row, args.sdist.resolve(), args.site.resolve(), Path(folder)))
            print(*sheet.lines[-1].cells, sep=", ", flush=True)
    show([sheet], Console())
    if not args.rows:
        RESULT.write_text(page(sheet), encoding="utf-8")
    return 0 if sheet.good else 1


def line(row: Row, sdist: Path, site: Path, folder: Path) -> Line:
    """A row's three losses, or what stopped it."""
    try:
        losses = trained(row, sdist, site, folder)
    except (Failed, subprocess.TimeoutExpired) as error:
        found, verdict = " ".join(str(error).split())[-200:], "RED"
    else:
        found, verdict = ", ".join(f"{loss:.4g}" for loss in losses), "trains"
    return Line([row.script, f"`{row.words}`", str(row.ranks), found, verdict], verdict == "trains")


def trained(row: Row, sdist: Path, site: Path, folder: Path) -> list[float]:
    """Losses of the job that the script writes. Raises Failed."""
    sbatch = folder / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 1\n")
    sbatch.chmod(0o755)
    # The scripts pack the checkout that they stand in.
    code = shutil.copytree(sdist, folder / "code", ignore=shutil.ignore_patterns(".git"))
    commit = "git init -q && git add -A scripts && git -c user.name=x -c user.email=x commit -qm x"
    subprocess.run(commit, shell=True, cwd=code, check=True)
    environment = {
        "PATH": f"{sbatch.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{site}:{ROOT}",
        "NEMORUN_HOME": str(folder / "runs"),
        "NXDT_NEMO_RUNTIME": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }

    def python(*words: str | Path, by: tuple[str, ...] = (), at: Path = folder, **more: str) -> str:
        script, *rest = map(str, words)
        done = run(Path(script), rest, at, seconds=SECONDS, command=by, environment=environment | more, cwd=at)
        if done.code:
            raise Failed("\n".join(done.output.splitlines()[-3:]))
        return done.output

    cluster = f"-a account -p partition -l {folder / 'runs'} --gpu h100 -ng {row.ranks} -gn {row.ranks} -cp 1 -mb 1"
    words = shlex.split(f"{cluster} -cg false {row.words}")
    python(f"scripts.performance.llm.{row.script}", *words, by=(*OURS, "-m"), at=code)
    (task,) = (folder / "runs").rglob("*_fn_or_script")
    (job,) = (folder / "runs").rglob(f"scripts/{task.name.removesuffix('_fn_or_script')}.sh")
    command = re.search(r"python -m (nemo_run\S+) -n (\S+) ", job.read_text())
    if command is None:
        raise Failed(f"no command in {job.name}")
    python(SMALLER, task, folder / "task", NXDT_NEMO="1")
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={row.ranks}", "-m")
    said = python(command[1], "-n", command[2], folder / "task", by=torchrun, NXDT_NEMO="1")
    losses = [float(loss) for loss in LOSS.findall(said)]
    if len(losses) != 3 or not all(map(math.isfinite, losses)):
        raise Failed(f"losses {losses}")
    return losses


def page(sheet: Sheet) -> str:
    """docs/results/performance.md."""
    return f"""# NeMo's performance scripts

{heading("python tools/performance.py SDIST SITE")}
`scripts/performance/llm` of the source distribution of nemo_toolkit 2.4.1, unedited, with nemo_run 0.5.0: started by
`nxdt-nemo run -m scripts.performance.llm.NAME -a ... -p ... --gpu h100 -ng RANKS -gn RANKS -cp 1 -mb 1 -cg false` and
the arguments below. Each writes its Slurm job; what the job hands to its ranks gets a model of four layers and 64
channels (all else as the script says: bfloat16, the optimizer, callbacks) and is run by the job's own command, under
torchrun.

{sheet.markdown}

The learning rate is that of the recipe's warm-up, so that losses hardly move in three steps. Not in the table:
`pretrain_gpt3_175b`, whose model is TransformerEngine's whole layer; models that are not megatron-core's GPT
(`pretrain_automodel_*`, `pretrain_nemotronh_*`); scripts that import a checkpoint from the hub first (`finetune_*`),
and fp8 (`mlperf_lora_*`); DeepSeek's, Llama 4's and the larger ones of the families above, which were not tried
beyond their job.
"""


if __name__ == "__main__":
    sys.exit(main())
