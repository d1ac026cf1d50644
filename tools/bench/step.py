"""A training step, ours beside stock megatron-core and Hugging Face's Llama of the same size.

    python tools/bench/step.py                              # 512 tokens a step, 8 minutes; writes docs/results/step.md
    python tools/bench/step.py --settings 256,1024 --families llama         # others; prints only

Every variant is a process of its own (stock cannot share one with an active backend) that holds the same model, the
same weights and the same text, on one thread. They step in turn, so that noise meets all; a ratio is the median of
the ratios of neighbouring steps. A step is forward, backward, clipping the gradient norm and AdamW, in float32.
Losses are compared before anything is timed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step_lib.worker import SHAPES
from turns import ROOT, SAME_LOSS, Worker, check_losses, in_turn, write_weights

PAGE = ROOT / "docs" / "results" / "step.md"
WORKER = str(ROOT / "tools" / "bench" / "step_lib" / "worker.py")
VARIANTS = {  # name: (families it has, limit of ours / it, environment)
    "ours": (("gpt", "llama"), None, {"NXDT_NEMO_RUNTIME": "cpu", "NXDT_NEMO": "0"}),
    "stock, fusions compiled": (("gpt", "llama"), 0.95, {"NXDT_NEMO": "0"}),
    "stock, fusions eager": (("gpt", "llama"), 0.95, {"NXDT_NEMO": "0", "TORCHDYNAMO_DISABLE": "1"}),
    "transformers": (("llama",), 0.80, {"NXDT_NEMO": "0"}),
}
COLUMNS = ("step", "forward and backward", "clip and AdamW")


def measure(family: str, setting: str, pairs: int, names: list[str]) -> dict[str, Any]:
    """Steps of all variants in turn; figures by variant."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        write_weights([WORKER, "weights", family, setting, str(weights)])
        workers = {
            name: Worker([WORKER, name, family, setting, str(weights)], environment)
            for name, (families, _, environment) in VARIANTS.items()
            if name in names and family in families
        }
        steps = in_turn(workers, pairs + 3)  # the first is reported apart, two more warm up
    check_losses(steps, "ours", 4)
    return {name: _figures(steps[name], steps["ours"], worker.about) for name, worker in workers.items()}


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


def table(setting: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown rows of one setting."""
    rows = []
    for family, variants in results.items():
        for name, found in variants.items():
            low, middle, high = found["step ratio"]
            parts = [f"{found[column] * 1000:.0f}" for column in COLUMNS]
            limit = VARIANTS[name][1]
            ratio = [""] * 6
            if limit is not None:
                inner = [f"{found[key][1]:.3f}" for key in ("forward and backward ratio", "step cpu ratio")]
                verdict = "met" if middle <= limit else "not met"
                ratio = [f"**{middle:.3f}**", f"{low:.3f} to {high:.3f}", *inner, f"{limit:.2f}", verdict]
            about = [setting, family, name, f"{found['first']:.1f}"]
            cells = [*about, *parts, f"{found['peak_mb']:.0f}", *ratio]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


HEADER = (
    *("Tokens a step", "Model", "Variant", "First step, s", "Step, ms", "forward and backward", "clip and AdamW"),
    *("Peak MB", "Ours / it", "quartiles", "forward and backward", "CPU time", "limit", ""),
)


def _page(pairs: int, rows: list[str]) -> str:
    packages = ("torch", "megatron-core", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"""# A step, beside stock megatron-core and Hugging Face

`python tools/bench/step.py`, {date.today().isoformat()}, {platform.machine()}, one thread a process.
Python {platform.python_version()}, {versions}.

Hidden 512, 8 layers, 8 heads, vocabulary 32000, float32, dropout 0; the same weights and text, and the same losses
(relative difference at most {SAME_LOSS:.0e}) before anything is timed. Variants step in turn; a ratio is the median of
{pairs} ratios of neighbouring steps. "stock" is megatron-core's local layers with torch's AdamW and clip_grad_norm_;
"transformers" is LlamaForCausalLM with SDPA attention and the same. Matrix products are most of a step and the same on
all sides, the more so the more tokens a step has.

{chr(10).join(rows)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--settings", default="512", help=f"tokens a step, of {', '.join(SHAPES)}; default: 512")
    parser.add_argument("--families", default="gpt,llama")
    parser.add_argument("--variants", default="", help="a part of the variants' names, comma separated")
    parser.add_argument("--pairs", type=int, default=30)
    args = parser.parse_args()
    for setting in args.settings.split(","):
        if setting not in SHAPES:
            parser.error(f"{setting} is none of {', '.join(SHAPES)}")
    wanted = [part for part in args.variants.split(",") if part]
    names = [name for name in VARIANTS if name == "ours" or not wanted or any(part in name for part in wanted)]
    found: dict[str, dict[str, Any]] = {}
    rows = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for setting in args.settings.split(","):
        found[setting] = {family: measure(family, setting, args.pairs, names) for family in args.families.split(",")}
        rows += table(setting, found[setting])
    print("\n".join(rows))
    if len(sys.argv) == 1:
        PAGE.write_text(_page(args.pairs, rows))
    ratios = [
        (one["step ratio"][1], VARIANTS[name][1])
        for results in found.values()
        for variants in results.values()
        for name, one in variants.items()
    ]
    met = all(limit is None or ratio <= limit for ratio, limit in ratios)
    print(json.dumps({"pairs": args.pairs, "met": met, "results": found}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
