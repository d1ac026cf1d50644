"""A training step, ours beside stock megatron-core and Hugging Face's Llama of the same size.

    python tools/bench/step.py [--setting long|accumulate] [--families gpt,llama] [--pairs 30] [--write FILE]

Every variant is a process of its own (stock cannot share one with an active backend) that holds the same model, the
same weights and the same text, on one thread. They step in turn, so that noise meets all; a ratio is the median of
the ratios of neighbouring steps. A step is forward, backward, clipping the gradient norm and AdamW, in float32.
Losses are compared before anything is timed. The last line is JSON.
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
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step_lib.worker import SHAPES

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {  # name: (families it has, limit of ours / it, environment)
    "ours": (("gpt", "llama"), None, {"NXDT_NEMO_RUNTIME": "cpu", "NXDT_NEMO": "0"}),
    "stock, fusions compiled": (("gpt", "llama"), 0.95, {"NXDT_NEMO": "0"}),
    "stock, fusions eager": (("gpt", "llama"), 0.95, {"NXDT_NEMO": "0", "TORCHDYNAMO_DISABLE": "1"}),
    "transformers": (("llama",), 0.80, {"NXDT_NEMO": "0"}),
}
SAME_LOSS = 2e-5  # relative, over the first steps, between any two variants
COLUMNS = ("step", "forward and backward", "clip and AdamW")


class Worker:
    """One variant in a process that steps when it is told to."""

    def __init__(self, variant: str, family: str, setting: str, weights: Path) -> None:
        environment = os.environ | VARIANTS[variant][2] | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        program = [sys.executable, str(ROOT / "tools/bench/step_lib/worker.py"), variant, family, setting, str(weights)]
        self._process = subprocess.Popen(
            program, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.about = self._answer()

    def step(self) -> dict[str, float]:
        """Seconds of each part of one step, wall and CPU time, and the loss."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("BENCH "):
                return dict(json.loads(line.removeprefix("BENCH ")))
        raise SystemExit(f"a worker ended with {self._process.wait(60)}")


def measure(family: str, setting: str, pairs: int, names: list[str]) -> dict[str, Any]:
    """Steps of all variants in turn; figures by variant."""
    names = [name for name in names if family in VARIANTS[name][0]]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        subprocess.run(
            [sys.executable, str(ROOT / "tools/bench/step_lib/worker.py"), "weights", family, setting, str(weights)],
            env=os.environ | VARIANTS["stock, fusions eager"][2],
            check=True,
            cwd=ROOT,
        )
        workers = {name: Worker(name, family, setting, weights) for name in names}
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for turn in range(pairs + 3):  # the first is reported apart, two more warm up
            order = names if turn % 2 == 0 else names[::-1]
            for name in order:
                steps[name].append(workers[name].step())
        for worker in workers.values():
            worker.close()
    _check_losses({name: [step["loss"] for step in taken[:4]] for name, taken in steps.items()})
    return {name: _figures(steps[name], steps["ours"], workers[name].about) for name in names}


def _check_losses(losses: dict[str, list[float]]) -> None:
    ours = losses["ours"]
    for name, theirs in losses.items():
        worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        if worst > SAME_LOSS:
            raise SystemExit(f"{name} does not train the same model: losses {theirs}, ours {ours}")


def _figures(steps: list[dict[str, float]], ours: list[dict[str, float]], about: dict[str, Any]) -> dict[str, Any]:
    timed, beside = steps[3:], ours[3:]
    found: dict[str, Any] = {"first": steps[0]["step"], "peak_mb": steps[-1]["peak_mb"], **about}
    found["losses"] = [step["loss"] for step in steps[:4]]
    for kind in ("", " cpu"):
        for column in COLUMNS:
            key = column + kind
            found[key] = statistics.median(step[key] for step in timed)
            ratios = [one[key] / other[key] for one, other in zip(beside, timed, strict=True)]
            found[key + " ratio"] = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return found


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown rows."""
    names = ("Model", "Variant", "First step, s", "Step, ms", "of it fwd+bwd", "clip+AdamW", "Ours / it", "quartiles")
    header = (*names, "fwd+bwd", "CPU time", "Peak MB", "Limit")
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for family, variants in results.items():
        for name, found in variants.items():
            low, middle, high = found["step ratio"]
            parts = [f"{found[column] * 1000:.0f}" for column in COLUMNS]
            limit = VARIANTS[name][1]
            ratio = ["", "", "", ""] if limit is None else [
                f"**{middle:.3f}**", f"{low:.3f} to {high:.3f}", f"{found['forward and backward ratio'][1]:.3f}",
                f"{found['step cpu ratio'][1]:.3f}"]  # fmt: skip
            cells = [family, name, f"{found['first']:.1f}", *parts, *ratio, f"{found['peak_mb']:.0f}",
                     "" if limit is None else f"{limit:.2f}"]  # fmt: skip
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def _page(command: str, setting: str, pairs: int, rows: list[str]) -> str:
    packages = ("torch", "megatron-core", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    shape = SHAPES[setting]
    return "\n".join(
        [
            f"`{command}`, {date.today().isoformat()}, Python {platform.python_version()}, {versions}; one thread.",
            f"Hidden 512, 8 layers, 8 heads, vocabulary 32000, float32, dropout 0; {shape['seq']} tokens x "
            f"{shape['micro_batch']} x {shape['micro_batches']} micro-batches a step; medians of {pairs} interleaved "
            "pairs.",
            "",
            *rows,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setting", choices=sorted(SHAPES), default="long")
    parser.add_argument("--families", default="gpt,llama")
    parser.add_argument("--variants", default="", help="a part of the variants' names, comma separated")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--write", type=Path, help="append the table to this page")
    args = parser.parse_args()
    wanted = [part for part in args.variants.split(",") if part]
    names = [name for name in VARIANTS if name == "ours" or not wanted or any(part in name for part in wanted)]
    results = {family: measure(family, args.setting, args.pairs, names) for family in args.families.split(",")}
    rows = table(results)
    print("\n".join(rows))
    if args.write:
        command = f"python tools/bench/step.py --setting {args.setting} --pairs {args.pairs}"
        with args.write.open("a") as file:
            file.write(_page(command, args.setting, args.pairs, rows) + "\n")
    met = all(
        VARIANTS[name][1] is None or found["step ratio"][1] <= VARIANTS[name][1]
        for variants in results.values()
        for name, found in variants.items()
    )
    print(json.dumps({"setting": args.setting, "pairs": args.pairs, "met": met, "results": results}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
