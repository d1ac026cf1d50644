"""`nxdt-nemo audit`: what a job would run, read before it is paid for.

Room cli/. Parses and prints; nxdt_nemo.audit.summary lowers and reads. Proof: tests/audit/test_audit.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nxdt_nemo.cli.output import into
from nxdt_nemo.errors import ConfigError

if TYPE_CHECKING:
    from nxdt_nemo.audit.hlo import Graph
    from nxdt_nemo.audit.summary import Audit, Rank

__all__ = ["audit"]

NUMBERS = ("trainer.devices", "model.num_layers", "model.micro_batch_size", "model.global_batch_size")
OTHERWISE = ("neuron.alignment", "model.peft", "model.data.train_ds", "model.mcore_bert", "model.mcore_t5")


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
    full: Annotated[bool, typer.Option("--full", help="Lower all layers and micro-batches, however many.")] = False,
    otherwise: Annotated[
        list[str] | None,
        typer.Option(
            "--except", metavar="RANK:KEY=VALUE", help="What a rank was started with otherwise.", show_default=False
        ),
    ] = None,
    hlo: Annotated[Path | None, typer.Option("--hlo", help="Write each rank's step there, as HLO text.")] = None,
) -> None:
    """Lower the training step of chosen ranks of a world, in one process, and run none of it.

    Exit code 1 if ranks that wait for each other lower different collectives, or a step reads what the host gave the
    device; 2 for what cannot be lowered.
    """
    import os
    import sys

    import nxdt_nemo
    from nxdt_nemo.audit.apart import go_on_in_a_child

    found, world = _checked(config, overrides or [], world)
    elsewhere = {
        number: _checked(config, [*(overrides or []), *said], world)[0]
        for number, said in _said(otherwise or []).items()
    }
    chosen = _numbers(rank or ranks, world)
    if hlo is not None:
        into(hlo, "--hlo")
    go_on_in_a_child()
    os.environ["NXDT_NEMO_RUNTIME"] = "xla"
    out = sys.stdout
    try:
        sys.stdout = sys.stderr  # NeMo and Lightning print
        nxdt_nemo.activate()
        result = _run(found, world, chosen, target, hlo, full, elsewhere)
    finally:
        sys.stdout = out
    typer.echo(json.dumps(result.as_json(), indent=2) if as_json else "\n".join(report(result)))
    if result.mismatch or any(one.host_transfers for one in result.ranks):
        raise typer.Exit(1)


def _checked(path: Path, overrides: Sequence[str], world: int) -> tuple[Any, int]:
    """The configuration, and the world; 0: devices x nodes. Raises ConfigError for what a run would refuse, for a
    configuration without the numbers that a step is sized by, and for one that trains otherwise than is lowered."""
    from nxdt_nemo.config.report import shown
    from nxdt_nemo.config.validate import read, validate_config
    from nxdt_nemo.config.view import View

    config = read(path, list(overrides))
    announced = {"WORLD_SIZE": str(world), "LOCAL_RANK": "0"} if world else {}
    for error in validate_config(config, place=path.name, environ=announced).errors:
        raise error
    view = View(config, place=path.name)
    for key in OTHERWISE:
        if view.get(key):
            raise view.error(f"{key}: an audit lowers the pretraining of a GPT only", f"leave {key} out")
    for key in NUMBERS:
        if (view.number(key) or 0) < 1:
            raise view.error(f"{key}={shown(view.raw(key))} is no number to size a step by", f"set {key}")
    return config, world or view.size("trainer.devices") * view.size("trainer.num_nodes")


def _numbers(text: str, world: int) -> list[int] | None:
    if not text:
        return None
    if text == "all":
        return list(range(world))
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ConfigError(f"{text!r} is no list of ranks", place="--rank", fix="give 0, or 0,31,64")
    return [int(part) for part in text.split(",")]


def _said(texts: Sequence[str]) -> dict[int, list[str]]:
    """Overrides by rank."""
    found: dict[int, list[str]] = {}
    for text in texts:
        rank, colon, override = text.partition(":")
        if not (colon and rank.isdecimal() and "=" in override):
            raise ConfigError(f"{text!r} is no override of a rank", place="--except", fix="give RANK:KEY=VALUE")
        found.setdefault(int(rank), []).append(override)
    return found


def _run(
    config: Any,
    world: int,
    ranks: list[int] | None,
    target: str,
    hlo: Path | None,
    whole: bool,
    elsewhere: dict[int, Any],
) -> Audit:
    from nxdt_nemo.audit.summary import audit as audited
    from nxdt_nemo.config.instances import instance

    def keep(rank: int, graph: Graph) -> None:
        if hlo is not None:
            (hlo / f"rank{rank}.hlo").write_text(graph.text)

    chip = instance(target, place="--target") if target else None
    return audited(config, world, ranks=ranks, target=chip, keep=keep, whole=whole, elsewhere=elsewhere)


def report(found: Audit) -> Iterator[str]:
    """Markdown: the job, a table of ranks, collectives of the first, and what is wrong."""
    yield from _what(found)
    yield ""
    yield "| rank | stage | graphs | parameters | TFLOP a micro-batch | of the count by hand | live GB | program |"
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
    if first.analytic or (first.bounds and first.bounds.mfu is not None):
        from nxdt_nemo.audit.formula import FORMULA

        yield "\nFLOPs by hand, of a micro-batch on a rank:\n"
        yield from (f"    {line}" for line in FORMULA.splitlines())


def _what(found: Audit) -> Iterator[str]:
    layers, micro = found.points.wanted
    counted = f"{layers} layer{'s' * (layers != 1)} a stage and chunk, {micro} micro-batch{'es' * (micro != 1)} a step"
    yield f"world {found.world}, {counted}; {len(found.ranks)} rank{'s' * (len(found.ranks) != 1)} lowered"
    few = [
        f"{' and '.join(map(str, lowered))} {name}"
        for name, lowered, wanted in (
            ("layers", found.points.layers, layers),
            ("micro-batches", found.points.micro, micro),
        )
        if wanted not in lowered
    ]
    if few:
        yield f"with {', with '.join(few)}; figures of the whole are in line with those (--full lowers all of it)"


def _row(one: Rank) -> str:
    by_hand = f"{one.flops / one.analytic.hardware:.4f}" if one.analytic else "no formula"
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
        live = f"{peak / 1e9:.1f} GB live at once, in an order that keeps few alive, of {found.hbm / 1e9:.1f} GB a rank"
        yield f"- memory: {live}: {word}"
    for one in found.ranks:
        if one.bounds:
            yield (
                f"- rank {one.rank}: no faster than {one.bounds.step * 1e3:.1f} ms a step, by {one.bounds.by} "
                f"(compute {one.bounds.compute * 1e3:.1f}, HBM {one.bounds.memory * 1e3:.1f}, NeuronLink "
                f"{one.bounds.neuronlink * 1e3:.1f}, network {one.bounds.network * 1e3:.1f}); "
                f"{'no formula for MFU' if one.bounds.mfu is None else f'MFU below {one.bounds.mfu:.2f}'}"
            )
    stages: dict[int, set[str]] = {}
    for one in found.ranks:
        stages.setdefault(one.stage[0], set()).add(one.program)
    several = [stage + 1 for stage, programs in stages.items() if len(programs) > 1]
    if several:
        yield f"- ranks of stages {several} run different programs: each is compiled"
    ratios = [one.sent_bytes / one.least_bytes for one in found.ranks if one.least_bytes]
    if ratios:
        known = max(one.sent_bytes / one.expected_bytes for one in found.ranks if one.expected_bytes)
        yield (
            f"- collectives' bytes (whole tensors) over the least that the layout needs: {max(ratios):.3f} at most; "
            f"over what it is known to send (docs/communication.md): {known:.3f}"
        )
    fell = {name for one in found.ranks for name in one.fallbacks}
    yield f"- operations that fall off XLA: {', '.join(sorted(fell)) or 'none'}"
    reads = sorted({place for one in found.ranks for place in one.host_transfers})
    yield f"- tensors of the device read by the host in a step: {', '.join(reads) or 'none'}"
    yield f"- deadlock check: {found.mismatch or agreement(found.compared)}"
    yield f"- {found.seconds:.0f} s"


def agreement(pairs: int) -> str:
    """What a deadlock check says that found nothing among so many pairs of ranks."""
    if not pairs:
        return "nothing compared: no two of the lowered ranks wait for each other; name some of one group"
    many = (
        f"{pairs} pairs of lowered ranks that wait for each other lower"
        if pairs > 1
        else "the one pair that waits for each other lowers"
    )
    return f"{many} the same collectives"
