"""`nxdt-nemo audit`: what a job would run, read before it is paid for.

Room cli/. Parses and prints; nxdt_nemo.audit.summary lowers and reads. Proof: tests/audit/test_audit.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nxdt_nemo.cli.output import into
from nxdt_nemo.errors import ConfigError, UserError

if TYPE_CHECKING:
    from nxdt_nemo.audit.hlo import Graph
    from nxdt_nemo.audit.summary import Audit, Rank
    from nxdt_nemo.config.instances import Instance

__all__ = ["audit"]

NUMBERS = ("trainer.devices", "model.num_layers", "model.micro_batch_size", "model.global_batch_size")
OTHERWISE = ("neuron.alignment", "model.peft", "model.data.train_ds", "model.mcore_bert", "model.mcore_t5")


def audit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A NeMo YAML of a GPT.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As on a NeMo script's command line.")
    ] = None,
    world: Annotated[
        int | None, typer.Option("--world", help="Ranks; default: devices x nodes.", show_default=False)
    ] = None,
    rank: Annotated[str, typer.Option("--rank", help="0, or 0,31,64; default: one of each stage.")] = "",
    ranks: Annotated[str, typer.Option("--ranks", help="`all`: every rank.")] = "",
    target: Annotated[
        str, typer.Option("--target", help="An instance, for its memory and peaks; default: neuron.instance.")
    ] = "",
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

    Exit code 1 if ranks that wait for each other lower different collectives, a step reads what the host gave the
    device, operations fall off XLA, or what is live is more than the instance has; 2 for what cannot be lowered.
    """
    import os
    import sys

    import nxdt_nemo
    from nxdt_nemo.audit.apart import go_on_in_a_child

    if world is not None and world < 1:
        raise ConfigError(
            f"{world} is no number of ranks", place="--world", fix="give 1 or more, or leave it out for devices x nodes"
        )
    found, world = _checked(config, overrides or [], world)
    said = _said(otherwise or []).items()
    elsewhere = {one: _otherwise(config, [*(overrides or []), *more], one, world) for one, more in said}
    chosen = _numbers(rank, ranks, world)
    chip = _target(found, target, config.name, world)
    if hlo is not None:
        into(hlo, "--hlo")
    go_on_in_a_child()
    os.environ["NXDT_NEMO_RUNTIME"] = "xla"
    out = sys.stdout
    try:
        sys.stdout = sys.stderr  # NeMo and Lightning print
        nxdt_nemo.activate()
        result = _run(found, world, chosen, chip, hlo, full, elsewhere)
    finally:
        sys.stdout = out
    typer.echo(json.dumps(result.as_json(), indent=2) if as_json else "\n".join(report(result)))
    if not result.runs:
        raise typer.Exit(1)


def _checked(path: Path, overrides: Sequence[str], world: int | None) -> tuple[Any, int]:
    """The configuration, and the world; None: devices x nodes. Raises ConfigError for what a run would refuse, for a
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


def _otherwise(path: Path, overrides: Sequence[str], rank: int, world: int) -> Any:
    """The configuration that a rank was started with; errors name the rank."""
    try:
        return _checked(path, overrides, world)[0]
    except UserError as error:
        raise ConfigError(str(error), place=f"--except {rank}") from None


def _target(config: Any, name: str, place: str, world: int) -> Instance | None:
    """The instance that was named, else the configuration's. Raises ConfigError for a job that it does not hold."""
    from nxdt_nemo.config.instances import instance
    from nxdt_nemo.config.job import job_of
    from nxdt_nemo.config.neuron import neuron_section
    from nxdt_nemo.config.view import View

    named = instance(name, place="--target") if name else None
    job = job_of(View(config, place=place), neuron_section(config, place=place), on=named)
    if job.devices and world > job.devices and world % job.devices:
        reason = f"{world} ranks are no whole number of nodes of trainer.devices={job.devices}"
        raise ConfigError(reason, place="--world", fix=f"use {world // job.devices * job.devices}")
    job.check_ranks()
    dataclasses.replace(job, nodes=max(1, world // (job.devices or 1))).check_nodes()
    return job.instance


def _numbers(rank: str, ranks: str, world: int) -> list[int] | None:
    """Either option's ranks, None for those that the audit chooses."""
    if rank and ranks:
        raise ConfigError("--rank and --ranks both say which ranks are lowered", fix="leave one of them out")
    place, text = ("--rank", rank) if rank else ("--ranks", ranks)
    if not text:
        return None
    if text == "all":
        return list(range(world))
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ConfigError(f"{text!r} is no list of ranks", place=place, fix="give 0, or 0,31,64, or all")
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
    target: Instance | None,
    hlo: Path | None,
    whole: bool,
    elsewhere: dict[int, Any],
) -> Audit:
    from nxdt_nemo.audit.summary import audit as audited

    def keep(rank: int, step: Sequence[Graph]) -> None:
        for place, graph in enumerate(step):
            if hlo is not None:
                name = f"rank{rank}.hlo" if len(step) == 1 else f"rank{rank}.{place}.hlo"
                (hlo / name).write_text(graph.text)

    return audited(config, world, ranks=ranks, target=target, keep=keep, whole=whole, elsewhere=elsewhere)


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
    yield "\nFLOPs are those of the lowered products: 2 x elements of the result x elements that are summed over."
    if found.formula:
        yield "By hand, of a micro-batch on a rank:\n"
        yield from (f"    {line}" for line in found.formula.splitlines())


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
        yield f"- memory: {_memory(found)}"
    yield f"- bytes of results by dtype, rank {found.ranks[0].rank}: {_shares(found.ranks[0].dtypes)}"
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


def _memory(found: Audit) -> str:
    live, has = f"{found.peak_bytes / 1e9:.1f} GB live at once", f"{found.hbm / 1e9:.1f} GB a rank of {found.target}"
    words = "fits" if found.fits else "LITTLE ROOM for gaps and the compiler's own buffers"
    if found.peak_bytes > found.hbm:
        words = "DOES NOT FIT"
    return f"{live}, in an order that keeps few alive, of {has}: {words}"


def _shares(sizes: Mapping[str, int]) -> str:
    whole = sum(sizes.values()) or 1
    shares = sorted(((size / whole, name) for name, size in sizes.items()), reverse=True)
    return ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.005)


def agreement(pairs: int) -> str:
    """What a deadlock check says that found nothing among so many pairs of ranks."""
    if not pairs:
        return "no two of the lowered ranks are in one group, of which nothing was compared; name some of one"
    many = (
        f"{pairs} pairs of lowered ranks that wait for each other lower"
        if pairs > 1
        else "the one pair that waits for each other lowers"
    )
    return f"{many} the same collectives"
