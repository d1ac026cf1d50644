"""`nxdt-nemo audit`: what a job would run, read before it is paid for.

Room cli/. Parses and prints; nxdt_nemo.audit.summary lowers and reads. Proof: tests/audit/test_audit.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nxdt_nemo.errors import ConfigError

if TYPE_CHECKING:
    from nxdt_nemo.audit.summary import Audit, Rank

__all__ = ["audit"]


def audit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A NeMo YAML of a GPT.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As on a NeMo script's command line.")
    ] = None,
    world: Annotated[int, typer.Option("--world", help="Ranks; default: devices x nodes.", show_default=False)] = 0,
    rank: Annotated[str, typer.Option("--rank", help="0, or 0,31,64; default: one of each stage.")] = "",
    ranks: Annotated[str, typer.Option("--ranks", help="`all`: every rank.")] = "",
    target: Annotated[str, typer.Option("--target", help="An instance, for its memory and peaks.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    hlo: Annotated[Path | None, typer.Option("--hlo", help="Write each rank's step there, as HLO text.")] = None,
) -> None:
    """Lower the training step of chosen ranks of a world, in one process, and run none of it.

    Exit code 1 if ranks that wait for each other lower different collectives, or a step reads the device.
    """
    import os
    import sys

    import nxdt_nemo

    os.environ["NXDT_NEMO_RUNTIME"] = "xla"
    found = _composed(config, overrides or [])
    out = sys.stdout
    try:
        if as_json:
            sys.stdout = sys.stderr  # NeMo prints
        nxdt_nemo.activate()
        result = _run(found, world, _numbers(rank or ranks, world), target, hlo)
    finally:
        sys.stdout = out
    typer.echo(json.dumps(result.as_json(), indent=2) if as_json else "\n".join(report(result)))
    if result.mismatch or any(one.host_transfers for one in result.ranks):
        raise typer.Exit(1)


def _composed(path: Path, overrides: Sequence[str]) -> Any:
    from nxdt_nemo.config.validate import read

    return read(path, list(overrides))


def _numbers(text: str, world: int) -> list[int] | None:
    if not text:
        return None
    if text == "all":
        return list(range(world))
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ConfigError(f"{text!r} is no list of ranks", place="--rank", fix="give 0, or 0,31,64")
    return [int(part) for part in text.split(",")]


def _run(config: Any, world: int, ranks: list[int] | None, target: str, hlo: Path | None) -> Audit:
    from nxdt_nemo.audit.summary import audit as audited
    from nxdt_nemo.config.instances import instance

    world = world or int(config.trainer.devices) * int(config.trainer.get("num_nodes") or 1)
    if hlo is not None:
        hlo.mkdir(parents=True, exist_ok=True)
    keep = None if hlo is None else lambda rank, graph: (hlo / f"rank{rank}.hlo").write_text(graph.text)
    chip = instance(target, place="--target") if target else None
    return audited(config, world, ranks=ranks, target=chip, keep=keep)


def report(found: Audit) -> Iterator[str]:
    """Markdown: the job, a table of ranks, collectives of the first, and what is wrong."""
    lowered = " and ".join(map(str, found.lowered_micro_batches))
    yield f"world {found.world}, {found.micro_batches} micro-batches a step; {len(found.ranks)} ranks lowered with {lowered}"
    if found.micro_batches not in found.lowered_micro_batches:
        yield "micro-batches a step, the rest added in line; all layers lowered"
    yield ""
    yield "| rank | stage | graphs | parameters | TFLOP a micro-batch | by hand | live GB | program |"
    yield "|---|---|---|---|---|---|---|---|"
    for one in found.ranks:
        yield _row(one)
    first = found.ranks[0]
    yield ""
    yield f"Collectives of rank {first.rank} in a step:"
    yield ""
    yield "| collective | dtype | ranks | times | GB received |"
    yield "|---|---|---|---|---|"
    for row in first.transfers:
        yield f"| {row.kind} | {row.dtype} | {_ranks(row.ranks)} | {row.times:.0f} | {row.received / 1e9:.3f} |"
    yield ""
    yield from _verdicts(found)


def _row(one: Rank) -> str:
    by_hand = f"{one.flops / one.analytic.hardware:.4f} of it" if one.analytic else "no formula"
    return (
        f"| {one.rank} | {one.stage[0] + 1} of {one.stage[1]} | {one.graphs} | {one.parameters:,} | "
        f"{one.flops / 1e12:.4f} | {by_hand} | {one.peak_bytes / 1e9:.2f} | {one.program[:12]} |"
    )


def _ranks(group: Sequence[int]) -> str:
    return ",".join(map(str, group)) if len(group) <= 4 else f"{group[0]},{group[1]}..{group[-1]} ({len(group)})"


def _verdicts(found: Audit) -> Iterator[str]:
    if found.hbm:
        peak = max(one.peak_bytes for one in found.ranks)
        word = "fits" if peak <= found.hbm else "DOES NOT FIT"
        yield f"- memory: {peak / 1e9:.1f} GB live at most, in program order, of {found.hbm / 1e9:.1f} GB a rank: {word}"
    for one in found.ranks:
        if one.bounds:
            yield (
                f"- rank {one.rank}: no faster than {one.bounds.step * 1e3:.1f} ms a step, by {one.bounds.by} "
                f"(compute {one.bounds.compute * 1e3:.1f}, HBM {one.bounds.memory * 1e3:.1f}, NeuronLink "
                f"{one.bounds.neuronlink * 1e3:.1f}, network {one.bounds.network * 1e3:.1f}); MFU below {one.bounds.mfu:.2f}"
            )
    stages: dict[int, set[str]] = {}
    for one in found.ranks:
        stages.setdefault(one.stage[0], set()).add(one.program)
    several = [stage + 1 for stage, programs in stages.items() if len(programs) > 1]
    if several:
        yield f"- ranks of stages {several} run different programs: each is compiled"
    ratios = [one.sent_bytes / one.least_bytes for one in found.ranks if one.least_bytes]
    if ratios:
        yield f"- collectives' bytes (whole tensors) over the least that the layout needs: {max(ratios):.3f} at most"
    fell = {name for one in found.ranks for name in one.fallbacks}
    yield f"- operations that fall off XLA: {', '.join(sorted(fell)) or 'none'}"
    reads = sorted({place for one in found.ranks for place in one.host_transfers})
    yield f"- tensors of the device read by the host in a step: {', '.join(reads) or 'none'}"
    yield f"- deadlock check: {found.mismatch or 'ranks that wait for each other lower the same collectives'}"
    yield f"- {found.seconds:.0f} s"
