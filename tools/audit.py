"""The audit of large jobs, and of the audit itself: docs/results/audit.md.

    python tools/audit.py                 # all rows; 40 minutes of two cores
    python tools/audit.py --rows 8b-64    # some of them; the page has the others' last outcome, of build/audit

Each row is `nxdt-nemo audit` in a process of its own; its seconds and memory are the process's. Exit code 1 when a
ratio is off (FLOPs by 2 %, collectives' bytes by 2 % of what is known to be sent and, without experts, of the least),
ranks of a stage have several programs, a row takes more than 10 minutes of processor time or 16 GB, small steps and the
whole differ, or a rank that was started otherwise is not found.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "audit.md"
KEPT = ROOT / "build" / "audit"  # each row's last outcome
LIMIT, SECONDS, GIGABYTES = 0.02, 600, 16

EIGHT = ("model=llama3_8b", "target=trn2", "model.tensor_model_parallel_size=32")
SEVENTY = (
    "model=llama3_70b",
    "target=trn2",
    "model.tensor_model_parallel_size=32",
    "model.pipeline_model_parallel_size=8",
)
MIXTRAL = (
    "model=mixtral_8x7b",
    "target=trn2",
    "trainer.num_nodes=1",
    "model.tensor_model_parallel_size=8",
    "model.pipeline_model_parallel_size=1",
    "++model.expert_model_parallel_size=8",
)
STAGES_2048 = ("--rank", "0,31,256,1792")  # of the first stage its first and last rank, of the second, of the last
FEW = ("model.num_layers=8", "model.global_batch_size=8")  # 4 micro-batches: what can be lowered whole


def of_tp8(rank: int) -> tuple[str, ...]:
    """A rank that was started with TP 8 and as many micro-batches: 8 replicas, where the others are 2."""
    return "--except", f"{rank}:model.tensor_model_parallel_size=8", "--except", f"{rank}:model.global_batch_size=8"


@dataclass(frozen=True)
class Row:
    """A job. `options`: further ones of the command; `kind`: what is looked at; `stages`: of its pipeline.

    Of kind experts more is sent than the least: each has room for all tokens of a rank (docs/moe.md).
    """

    name: str
    job: str
    world: int
    overrides: tuple[str, ...]
    options: tuple[str, ...] = ()
    kind: str = "size"
    stages: int = 1

    def programs(self, ranks: Iterable[int]) -> int:
        """How many these ranks should have: one a stage."""
        return len({rank // (self.world // self.stages) for rank in ranks})


ROWS = (
    Row("8b-64", "Llama-3 8B, TP 32 x DP 2", 64, EIGHT),
    Row("8b-512", "Llama-3 8B, TP 32 x DP 16", 512, EIGHT),
    Row("8b-2048", "Llama-3 8B, TP 32 x DP 64", 2048, EIGHT),
    Row("70b-512", "Llama-3 70B, TP 32 x PP 8 x DP 2, every stage", 512, SEVENTY, stages=8),
    Row("70b-2048", "Llama-3 70B, TP 32 x PP 8 x DP 8", 2048, SEVENTY, STAGES_2048, stages=8),
    Row(
        "all",
        "Llama-3 8B of 1 layer, TP 32, every rank",
        32,
        (*EIGHT, "model.num_layers=1", "model.global_batch_size=1"),
        ("--ranks", "all"),
    ),
    Row(
        "mixtral-64",
        "Mixtral 8x7B, TP 8 x EP 8",
        64,
        MIXTRAL,
        ("--rank", "0,1,8"),  # of one group of tensor parallelism 0 and 1, of one of experts 0 and 8
        "experts",
    ),
    Row("small", "Llama-3 8B of 8 layers, by small steps", 64, EIGHT + FEW, ("--rank", "0"), "pair"),
    Row("whole", "the same, lowered whole", 64, EIGHT + FEW, ("--rank", "0", "--full"), "pair"),
    Row(
        "broken",
        "Llama-3 8B, rank 1 without sequence parallelism",
        64,
        (*EIGHT, "model.num_layers=1"),
        ("--rank", "0,1", "--except", "1:model.sequence_parallel=False"),
        "broken",
    ),
    Row(
        "groups",
        "Llama-3 8B, rank 1 with TP 8 and a batch of as many micro-batches: other groups alone",
        64,
        (*EIGHT, "model.num_layers=1", "model.global_batch_size=2"),
        ("--rank", "0,1", *of_tp8(1)),
        "broken",
    ),
    Row(
        "apart",
        "the same of rank 33, which is in no group with rank 0 before",
        64,
        (*EIGHT, "model.num_layers=1", "model.global_batch_size=2"),
        ("--rank", "0", *of_tp8(33)),
        "broken",
    ),
)


@dataclass(frozen=True)
class Found:
    """The command's JSON and exit code, and what it took: seconds, processor seconds, bytes."""

    report: dict[str, Any]
    code: int
    seconds: float
    busy: float
    memory: int


def run(row: Row) -> Found:
    """The command, in a process of its own."""
    arguments = ["configs/train.yaml", *row.overrides, "--world", str(row.world), "--target", "trn2.48xlarge", "--json"]
    call = "from nxdt_nemo.cli.main import main; main()"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        began = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-c", call, "audit", *arguments, *row.options], cwd=ROOT, stdout=out, stderr=errors
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - began
        out.seek(0)
        errors.seek(0)
        text = out.read()
        if not text:
            raise SystemExit(f"{row.name}: {errors.read()[-2000:]}")
    return Found(
        json.loads(text),
        os.waitstatus_to_exitcode(status),
        seconds,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024,
    )


def colour(fine: bool) -> str:
    return "green" if fine else "RED"


def size(row: Row, found: Found) -> tuple[str, bool]:
    """A line of the first table."""
    ranks = found.report["ranks"]
    flops = max((one["flops"] / one["analytic"]["hardware"] for one in ranks), key=lambda ratio: abs(ratio - 1))
    sent = max(one["sent_bytes"] / one["least_bytes"] for one in ranks)
    known = max((one["sent_bytes"] / one["expected_bytes"] for one in ranks), key=lambda ratio: abs(ratio - 1))
    slowest = max(ranks, key=lambda one: one["bounds"]["step"])
    programs, most = len({one["program"] for one in ranks}), row.programs(one["rank"] for one in ranks)
    fits = found.busy <= SECONDS and found.memory <= GIGABYTES * 1e9
    good = (
        abs(flops - 1) <= LIMIT and abs(known - 1) <= LIMIT and (sent <= 1 + LIMIT or row.kind == "experts")
        and fits and found.code == 0 and found.report["mismatch"] is None
        and programs <= most and not found.report["fallbacks"] and not found.report["host_transfers"]
    )  # fmt: skip
    cells = (
        row.job,
        row.world,
        len(ranks),
        f"{flops:.4f}",
        f"{sent:.4f}",
        f"{known:.4f}",
        found.report["graphs"],
        f"{found.report['peak_bytes'] / 1e9:.1f} of {found.report['hbm_bytes'] / 1e9:.1f}",
        f"{slowest['bounds']['step']:.2f} s, {slowest['bounds']['by']}",
        f"{found.report['mfu_bound']:.2f}",
        f"{found.seconds:.0f}",
        f"{found.busy:.0f}",
        f"{found.memory / 1e9:.1f}",
        f"{programs} of {most}",
        colour(good),
    )
    return f"| {' | '.join(map(str, cells))} |", good


COLUMNS = (
    "job", "world", "ranks lowered", "FLOPs / by hand", "collectives' bytes / least", "/ known", "graphs", "live GB",
    "no faster than", "MFU bound", "s", "processor s", "GB", "programs, at most", "",
)  # fmt: skip


def pair(small: Found, whole: Found) -> tuple[list[str], bool]:
    """Small steps beside the whole one."""
    lines = ["| figure | by small steps | whole | ratio | |", "|---|---|---|---|---|"]
    good = True
    for name, near in (
        ("flops", 1e-6),
        ("parameters", 1e-6),
        ("sent_bytes", 1e-3),
        ("state_bytes", 1e-3),
        ("peak_bytes", 1e-2),
    ):
        ours, theirs = (found.report["ranks"][0][name] for found in (small, whole))
        fine = abs(ours / theirs - 1) <= near
        good &= fine
        lines.append(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.5f} | {colour(fine)} |")
    return lines, good


def page(found: dict[str, Found]) -> tuple[str, bool]:
    """The results, and whether all is green."""
    good = True
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torch_xla", "megatron-core", "nemo_toolkit"))
    shared = f"{os.cpu_count()} cores that others used as well (load {os.getloadavg()[0]:.0f} at the end)"
    lines = [
        "# Audit\n",
        f"`python tools/audit.py`, {datetime.date.today()}, {shared}:",
        f"a row's time is its processor time. Python {platform.python_version()}, {versions}.",
        "What the figures are: [audit.md](../audit.md). trn2.48xlarge, bfloat16, sequence parallelism, sharded",
        "optimizer.\n",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for row in ROWS:
        if row.kind in ("size", "experts") and row.name in found:
            line, fine = size(row, found[row.name])
            lines.append(line)
            good &= fine
    if {"small", "whole"} <= set(found):
        rows, fine = pair(found["small"], found["whole"])
        lines += [
            "\nSmall steps (1 and 2 layers, 1 and 3 micro-batches) against all 8 layers and 4 micro-batches:\n",
            *rows,
        ]
        good &= fine
    for row in ROWS:
        if row.kind == "broken" and row.name in found:
            told = found[row.name].report["mismatch"]
            fine = found[row.name].code == 1 and bool(told) and "over ranks" in told
            asked = " ".join(row.options)
            lines.append(f"\n{row.job} (`{asked}`): exit code {found[row.name].code}, {told}. {colour(fine)}")
            good &= fine
    return "\n".join(lines) + "\n", good


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"some of: {', '.join(row.name for row in ROWS)}")
    asked = parser.parse_args(arguments).rows
    names = asked.split(",") if asked else [row.name for row in ROWS]
    if unknown := {*names} - {row.name for row in ROWS}:
        parser.error(f"--rows: there is no {', '.join(sorted(unknown))}")
    KEPT.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        if row.name in names:
            print(f"{row.name} ...", file=sys.stderr, flush=True)
            (KEPT / f"{row.name}.json").write_text(json.dumps(asdict(run(row))))
    files = {row.name: KEPT / f"{row.name}.json" for row in ROWS}
    found = {name: Found(**json.loads(file.read_text())) for name, file in files.items() if file.exists()}
    text, good = page(found)
    print(text)
    if missing := [row.name for row in ROWS if row.name not in found]:
        print(f"{RESULT.name} stays as it is: never run here: {', '.join(missing)}", file=sys.stderr)
    else:
        RESULT.write_text(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
