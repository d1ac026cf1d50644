"""Time from the command to the first step, and where it goes, beside the same imports in plain Python.

    python tools/bench/startup.py [--pairs 5] [--write]

"plain" is the import statements of NeMo's megatron_gpt_pretraining.py and all that they pull in, with none of ours;
stock NeMo cannot go further on a machine without CUDA. "ours" is the whole script, to its first step. All variants
are run in turn, so that noise meets each, after one run that warms the file cache and lets Python write its bytecode;
figures are medians. Then runs of both under `python -X importtime` name what is saved and what is left. The last line
is JSON; --write writes docs/results/startup.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from startup_lib.import_times import Line, by_package, medians, read

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/results/startup.md"
SCRIPT = ROOT / "tools/bench/startup_lib/pretraining.py"
LIMIT = 0.8
SMALL = 0.1  # seconds; lines below are summed up

# What both need to be compared: bytecode, no look-ups in a network, one thread.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NXDT_NEMO": "", "NXDT_NEMO_RUNTIME": "cpu"}


class Bench:
    """A small Llama on one rank, in a folder with its corpus."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(ROOT / "tools"))
        from demo_lib.corpus import write_corpus
        from demo_lib.tokens import index_corpus, train_tokenizer

        self.folder = folder
        write_corpus(folder / "corpus.jsonl")
        train_tokenizer(folder / "corpus.jsonl", folder / "tokenizer.model")
        index_corpus(folder / "corpus.jsonl", folder / "tokenizer.model", folder / "corpus_text_document")

    def plain(self, *options: str) -> tuple[float, str]:
        """Seconds of the script's imports in plain Python, and what it wrote to stderr."""
        start = time.time()
        named = {"BENCH_START": repr(start), "BENCH_ONLY_IMPORTS": "1"}
        done = self._python([*options, str(SCRIPT)], named)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return time.time() - start, done.stderr

    def ours(self, *options: str, workers: int = 0, method: str = "spawn") -> tuple[dict[str, float], str]:
        """Seconds from the command to each mark of the whole script, and what it wrote to stderr.

        workers, method   model.data.num_workers, and how the script asks for them to be started
        """
        run = self.folder / f"run_{time.time_ns()}"
        overrides = [
            f"--config-path={ROOT / 'configs'}",
            "--config-name=demo_llama",
            f"exp_manager.explicit_log_dir={run}",
            f"model.tokenizer.model={self.folder / 'tokenizer.model'}",
            f"model.data.data_prefix=[1.0,{self.folder / 'corpus_text_document'}]",
            f"model.data.index_mapping_dir={self.folder / 'index'}",
            f"model.data.num_workers={workers}",
            "trainer.devices=1",
            "model.tensor_model_parallel_size=1",
            "trainer.max_steps=1",
            "trainer.val_check_interval=1",
            "trainer.limit_val_batches=1",
            "exp_manager.create_checkpoint_callback=false",
        ]
        marks = run.with_suffix(".json")
        named = {"BENCH_START": repr(time.time()), "BENCH_MARKS": str(marks), "BENCH_METHOD": method}
        done = self._python([*options, "-m", "nxdt_nemo", "run", str(SCRIPT), *overrides], named)
        if not marks.exists():
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        return json.loads(marks.read_text()), done.stderr

    def _python(self, arguments: list[str], named: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=ENVIRONMENT | named, cwd=ROOT, capture_output=True, text=True)


def measure(bench: Bench, pairs: int) -> dict[str, Any]:
    """Medians, and the ratio of neighbours."""
    bench.plain()
    bench.ours()
    plain, ours, forked, spawned = [], [], [], []
    for _ in range(pairs):
        plain.append(bench.plain()[0])
        ours.append(bench.ours()[0])
        forked.append(bench.ours(workers=2)[0]["first step"])
        spawned.append(bench.ours(workers=2, method="forkserver")[0]["first step"])
    marks = {key: statistics.median(run[key] for run in ours) for key in ours[0]}
    ratios = [run["first step"] / one for run, one in zip(ours, plain, strict=True)]
    return {
        "plain_imports_s": statistics.median(plain),
        "first_save_s": statistics.median(run["first save"] - run["first step"] for run in ours),
        "two_workers_s": {"fork": statistics.median(forked), "forkserver": statistics.median(spawned)},
        "marks_s": {key: value for key, value in marks.items() if key != "first save"},
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
        "pairs": pairs,
    }


def imports(bench: Bench, pairs: int) -> tuple[list[Line], list[Line]]:
    """What plain Python imports and ours does not, to its first step and save; and what ours does import."""
    stock, here = [], []
    for _ in range(pairs):
        stock.append(read(bench.plain("-X", "importtime")[1]))
        here.append(read(bench.ours("-X", "importtime")[1]))
    kept = {one.name for one in here[0]}
    return by_package(one for one in medians(stock) if one.name not in kept), by_package(medians(here))


def table(lines: list[Line]) -> list[str]:
    """Markdown rows, largest first, with the small ones in one."""
    shown = [line for line in lines if line.seconds >= SMALL]
    rest = [line for line in lines if line.seconds < SMALL]
    rows = ["| Package | s | modules | first asked for by |", "|---|---|---|---|"]
    rows += [f"| {one.package} | {one.seconds:.2f} | {one.modules} | {one.asked_by or 'no module'} |" for one in shown]
    seconds, modules = sum(one.seconds for one in rest), sum(one.modules for one in rest)
    rows.append(f"| {len(rest)} others | {seconds:.2f} | {modules} | |")
    seconds, modules = sum(one.seconds for one in lines), sum(one.modules for one in lines)
    return [*rows, f"| **all** | **{seconds:.2f}** | **{modules}** | |"]


def report(found: dict[str, Any], saved: list[Line], left: list[Line]) -> list[str]:
    """The page's lines below its heading."""
    packages = ("torch", "nemo_toolkit", "megatron-core", "lightning")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    workers, marks = found["two_workers_s"], found["marks_s"]
    rows, before = [], 0.0
    for key, value in marks.items():
        rows.append(f"| {key} | {value:.1f} | {value - before:.1f} |")
        before = value
    return [
        f"`python tools/bench/startup.py --pairs {found['pairs']} --write`, {date.today().isoformat()}, "
        f"Python {platform.python_version()}, {versions}; {os.cpu_count()} CPU cores, bytecode compiled.",
        f"A small Llama on one rank, by the lines of NeMo's `megatron_gpt_pretraining.py`; medians of {found['pairs']} "
        "rounds, all variants in turn.",
        "",
        "| Mark | s from the command | s in between |",
        "|---|---|---|",
        *rows,
        "",
        f"The script's imports alone, in plain Python in the same rounds: {found['plain_imports_s']:.1f} s. "
        f"First step / plain imports: **{found['ratio']:.2f}** ({found['ratios'][0]:.2f} to {found['ratios'][1]:.2f}; "
        f"at most {LIMIT}).",
        "Stock NeMo gets no further than those imports without CUDA.",
        "",
        f"With two data workers (`model.data.num_workers=2`), which the script asks to be spawned: first step after "
        f"{workers['fork']:.1f} s. They are forked on the cpu lane; started as asked, each imports the script again: "
        f"{workers['forkserver']:.1f} s (by `forkserver`, which is left as it is asked for).",
        f"The first checkpoint takes {found['first_save_s']:.2f} s; its helper process is forked too.",
        "",
        "## What is saved",
        "",
        "Seconds that plain Python spends in modules that ours has not loaded when the first checkpoint is written. "
        "From here on by `python -X importtime`, which makes imports slower; medians.",
        "",
        *table(saved),
        "",
        "## What is left",
        "",
        "Seconds that ours spends in the modules of each package. Why what a script does not use is there: torch's "
        "optimizers import `torch._dynamo`, and that sympy and triton, for their first parameter group; torchmetrics "
        "uses `scipy.signal` and matplotlib, and NeMo's logger for ClearML pandas, while they are imported themselves; "
        "Lightning imports s3fs (aiobotocore, aiohttp) to learn that a folder is not in S3.",
        "",
        *table(left),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        found = measure(bench, args.pairs)
        saved, left = imports(bench, min(args.pairs, 3))
    lines = report(found, saved, left)
    print("\n".join(lines))
    if args.write:
        PAGE.write_text("\n".join(["# Start-up: from the command to the first step", "", *lines, ""]))
    met = found["ratio"] <= LIMIT
    print(json.dumps({**found, "met": met}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
