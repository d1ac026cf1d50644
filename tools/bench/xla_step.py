"""A step of the xla lane on XLA:CPU, beside the eager cpu lane and AWS's NxD Core on XLA:CPU.

    python tools/bench/xla_step.py --nxd CHECKOUT                    # 8 minutes; writes docs/results/xla_step.md
    python tools/bench/xla_step.py --nxd CHECKOUT --settings 128     # some hidden sizes; prints only

CHECKOUT is one of https://github.com/aws-neuron/neuronx-distributed. Every variant is a process of its own that holds
the same Llama, the same weights and the same text, in float32, and every process is held to one and the same processor
core, XLA's threads too. They step in turn, so that noise meets all; a ratio is the median of the ratios of neighbouring
steps. A step is forward, backward, clipping the gradient norm and AdamW, until the device is done. Losses are compared
before anything is timed. The products of the step's linear layers, and nothing else, take their turns too: what is left
of a goal beside them. Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from turns import ROOT, SAME_LOSS, Worker, check_losses, in_turn, write_weights
from xla_step_lib.worker import SETTINGS, recipe_of

PAGE = ROOT / "docs" / "results" / "xla_step.md"
WORKER = str(ROOT / "tools" / "bench" / "xla_step_lib" / "worker.py")
OURS, EAGER, NXD = "the xla lane", "the cpu lane, eager", "NxD Core"
ALONE, ALONE_EAGER = f"products alone, {OURS}", f"products alone, {EAGER}"
VARIANTS = {
    OURS: ("ours", {"NXDT_NEMO_RUNTIME": "xla", "NXDT_NEMO": "0"}),
    EAGER: ("ours", {"NXDT_NEMO_RUNTIME": "cpu", "NXDT_NEMO": "0"}),
    NXD: ("nxd", {"NXDT_NEMO": "0", "PJRT_DEVICE": "CPU"}),
    ALONE: ("products", {"NXDT_NEMO_RUNTIME": "xla", "NXDT_NEMO": "0"}),
    ALONE_EAGER: ("products", {"NXDT_NEMO_RUNTIME": "cpu", "NXDT_NEMO": "0"}),
}
STEPS = (OURS, EAGER, NXD)
DOMINATES = "1024"  # the hidden size at which compute does
WARM = 4


def measure(setting: str, pairs: int, checkout: str) -> dict[str, dict[str, Any]]:
    """Steps of all variants in turn; figures by variant."""
    core = max(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        write_weights([WORKER, "weights", setting, str(weights)])
        workers = {
            name: Worker([WORKER, kind, setting, str(weights), checkout], environment, core)
            for name, (kind, environment) in VARIANTS.items()
            if name != NXD or checkout
        }
        steps = in_turn(workers, pairs + WARM)
    check_losses({name: taken for name, taken in steps.items() if name in STEPS}, OURS, WARM)
    return {name: _figures(taken, steps[OURS]) for name, taken in steps.items()}


def _figures(steps: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, Any]:
    timed, beside = steps[WARM:], ours[WARM:]
    found: dict[str, Any] = {key: statistics.median(one[key] for one in timed) for key in timed[0]}
    ratios = [one["step"] / other["step"] for one, other in zip(beside, timed, strict=True)]
    return found | {
        "graphs": sum(one["compiled"] for one in steps[:WARM]),
        "later": sum(one["compiled"] for one in timed),
        "ratio": statistics.quantiles(ratios, n=4),
    }


def goal(setting: str, variant: str) -> float | None:
    """What ours over it should be at most."""
    return {EAGER: 0.8 if setting == DOMINATES else None, NXD: 0.75}.get(variant)


HEADER = (
    "Hidden", "Tokens", "Variant", "Step, ms", "tracing", "Graphs", "later ones", "Ours / it", "quartiles",
    "goal", "",
)  # fmt: skip


def rows_of(setting: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown rows of one setting."""
    rows, recipe = [], recipe_of(setting)
    for name, one in found.items():
        low, middle, high = one["ratio"]
        wanted = goal(setting, name)
        verdict = "" if wanted is None else "met" if middle <= wanted else "NOT MET"
        ratio = (f"**{middle:.3f}**", f"{low:.3f} to {high:.3f}") if name in (EAGER, NXD) else ("", "")
        traced = name in (OURS, NXD)
        cells = (
            setting, recipe.seq * recipe.micro_batch, name, f"{one['step'] * 1000:.0f}",
            f"{one['tracing'] * 1000:.0f}" if traced else "", one["graphs"] if traced else "",
            one["later"] if traced else "", *ratio, "" if wanted is None else f"{wanted:.2f}", verdict,
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def _share(setting: str, found: dict[str, dict[str, Any]]) -> str:
    """What the products alone are of the other variants' steps."""
    eager, nxd = (found[ALONE]["step"] / found[name]["step"] for name in (EAGER, NXD))
    return f"{eager:.2f} and {nxd:.2f} at hidden size {setting}"


def _page(pairs: int, rows: list[str], shares: str, revision: str) -> str:
    packages = ("torch", "torch_xla", "megatron-core", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"""# A step on XLA:CPU, beside eager and NxD Core

`python tools/bench/xla_step.py --nxd CHECKOUT`, {date.today().isoformat()}, {platform.machine()}, all processes on
one core. Python {platform.python_version()}, {versions}; neuronx-distributed {revision}.

A Llama of 4 layers (RMSNorm, SwiGLU, rotary positions, grouped queries, vocabulary 8192), float32, one rank; the same
weights, text and learning rates, and the same losses (relative difference at most {SAME_LOSS:.0e}) before anything is
timed. A step is forward, backward, clipping and AdamW, until the device is done; "tracing" is processor time of the
program's own thread until the graph is handed over, in ms, which a device would run beside. Variants step in turn; a
ratio is the median of {pairs} ratios of neighbouring steps. NxD Core is AWS's library with its example's Llama, torch's
AdamW and NxD's clipping; its imports of Neuron's compiler and kernels are answered by names that do nothing
(`tools/bench/xla_step_lib/nxd.py`). "products alone" are those of the step's linear layers, forward and backward, one
after the other, with no operand transposed, the order that XLA:CPU multiplies fastest in.

{chr(10).join(rows)}

Goals: 0.75 of NxD Core everywhere; 0.8 of the eager lane at hidden size {DOMINATES}, where compute dominates.
Products alone on the xla lane, over a step of the eager lane and over one of NxD Core: {shares}.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nxd", default="", help="a checkout of neuronx-distributed; without it, it is left out")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="hidden sizes; default: all")
    parser.add_argument("--pairs", type=int, default=12)
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error("--pairs: a ratio is the median of two at least")
    settings = args.settings.split(",")
    for setting in settings:
        if setting not in SETTINGS:
            parser.error(f"{setting} is none of {', '.join(SETTINGS)}")
    rows, shares, met = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"], [], True
    for setting in settings:
        found = measure(setting, args.pairs, args.nxd)
        rows += rows_of(setting, found)
        shares += [_share(setting, found)] if args.nxd else []
        met &= all(one["ratio"][1] <= (goal(setting, name) or 9) for name, one in found.items())
        print("\n".join(rows[-len(found) :]), flush=True)
    if args.nxd and settings == list(SETTINGS):
        file = Path(args.nxd) / "src/neuronx_distributed/_version.py"
        PAGE.write_text(
            _page(
                args.pairs,
                rows,
                "; ".join(shares),
                file.read_text().partition('"')[2].partition('"')[0] or "of a checkout",
            )
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
