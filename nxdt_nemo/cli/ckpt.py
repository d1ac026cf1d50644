"""`nxdt-nemo ckpt`: what is in a checkpoint, and another one made of it.

Room cli/. Imports typer; rich, torch and the checkpoint room are loaded by the command that needs them.
Proof: tests/checkpoint/test_cli.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nxdt_nemo import __version__
from nxdt_nemo.errors import UserError

if TYPE_CHECKING:
    from nxdt_nemo.checkpoint.convert import Report

__all__ = ["app"]

app = typer.Typer(help="Checkpoints: inspect, convert, merge adapters.", no_args_is_help=True, rich_markup_mode=None)

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_OPTIMIZER_FORMATS = ("fully_sharded_model_space", "model_space", "distrib_optim")
_SHOWN = 40  # tensors that are listed unless --all

_From = Annotated[str, typer.Option("--from", help="The source's format, if it is not to be found out.")]
_Family = Annotated[str, typer.Option(help="The model's family, if the source does not tell.")]
_Config = Annotated[
    Path | None, typer.Option("--model-config", help="A config.json, for sources that do not say what the model is.")
]
_Step = Annotated[int | None, typer.Option(help="The iteration to read; the latest by default.")]
_Option = Annotated[
    list[str] | None,
    typer.Option(
        "--option", help="KEY=VALUE, of one format: hw_backend=trn1, xser=true. See docs/checkpoint_formats.md."
    ),
]
_Vocab = Annotated[int | None, typer.Option("--vocab-size", help="Rows that mean a token; further ones are padding.")]


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint's folder, or its URL.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: all there is.")] = False,
    every: Annotated[bool, typer.Option("--all", help="List every tensor.")] = False,
    from_: _From = "",
    family: _Family = "",
    model_config: _Config = None,
    step: _Step = None,
    vocab_size: _Vocab = None,
    option: _Option = None,
) -> None:
    """Format, model, layout, tensors and where they lie, optimizer, progress, what is suspicious. Reads no tensor."""
    from nxdt_nemo.checkpoint.formats.base import Options
    from nxdt_nemo.checkpoint.inspect import inspect as look
    from nxdt_nemo.checkpoint.inspect import summary
    from nxdt_nemo.checkpoint.io.remote import path_of

    found = summary(look(path_of(path), Options(from_, family, model_config, step, vocab_size, extra=_options(option))))
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
    else:
        typer.echo("\n".join(_lines(found, every)))


def _lines(found: dict[str, Any], every: bool) -> Iterator[str]:
    model, optimizer = found["model"], found["optimizer"]
    yield f"{found['path']}: {found['format']}, {found['family']}, {found['parameters']:,} parameters"
    keys = ("layers", "hidden", "ffn", "heads", "groups", "head_size", "vocab", "padded_vocab", "positions", "experts")
    yield "model      " + ", ".join(f"{key} {model[key]}" for key in keys if model[key])
    layout = {key: size for key, size in found["layout"].items() if size not in (0, 1, ()) and key != "etp"}
    yield "layout     " + (", ".join(f"{key.upper()} {size}" for key, size in layout.items()) or "one rank")
    yield f"dtype      {', '.join(found['dtypes'])}"
    said = f"iteration {found['iteration']}, {found['consumed_samples']} samples"
    yield "progress   " + (said if found["iteration"] is not None else "none recorded: weights only")
    state = f"{', '.join(optimizer['state'])}, step {optimizer['step']}" if optimizer["state"] else "no state"
    yield f"optimizer  {state}"
    if found["manifest"]:
        origin = (found["manifest"].get("source") or {}).get("path")
        yield f"origin     {found['manifest'].get('written_by')} from {origin}"
    yield f"files      {len(found['files'])}, {_size(found['bytes'])}"
    for note in found["notes"]:
        yield f"note       {note}"
    shown = [tensor for tensor in found["tensors"] if every or tensor["kind"] == "model"]
    yield ""
    for tensor in shown if every else shown[:_SHOWN]:
        name = tensor["name"] if tensor["kind"] == "model" else f"{tensor['kind']} {tensor['name']}"
        where = tensor["where"][0] + (f" and {len(tensor['where']) - 1} more" if len(tensor["where"]) > 1 else "")
        yield f"{name:44} {list(tensor['shape'])!s:20} {tensor['dtype']:5} {where}"
    if not every and len(found["tensors"]) > _SHOWN:
        yield f"... {len(found['tensors']) - min(_SHOWN, len(shown))} more: --all"


def _options(given: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE as a table: true, false and whole numbers as what they are."""
    found: dict[str, Any] = {}
    for one in given or ():
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise UserError(f"{one} is not KEY=VALUE", place="--option", fix="write --option xser=true")
        known = {"true": True, "false": False}
        found[key] = int(value) if value.isdigit() else known.get(value.lower(), value)
    return found


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1000
    return f"{count:.1f} TB"


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="The checkpoint to read, or its URL.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not be there.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="Format to write: hf, hf_bin, torch_dist, torch, nemo, nemo2, nemo_dist, ptl, nnm, nxdt.",
            show_default=False,
        ),
    ],
    tp: Annotated[int, typer.Option(help="Tensor parallel size.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    vpp: Annotated[int, typer.Option(help="Virtual stages of each stage.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert parallel size.")] = 1,
    etp: Annotated[int, typer.Option(help="Tensor parallel size of experts; 0 for --tp.")] = 0,
    stages: Annotated[str, typer.Option(help="Layers of each stage if they differ: 5,6,6,5.")] = "",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32; as the source's by default.")] = "",
    with_optimizer: Annotated[bool, typer.Option("--with-optimizer", help="Take optimizer state along.")] = False,
    optimizer_format: Annotated[
        str,
        typer.Option(
            help="torch_dist: fully_sharded_model_space (Megatron's distributed) or model_space; torch: distrib_optim "
            "for Megatron's distributed, else the other."
        ),
    ] = "fully_sharded_model_space",
    spec: Annotated[
        str, typer.Option(help="torch: layer spec of the run that loads it, local or te; legacy for old names.")
    ] = "local",
    divisible_by: Annotated[int, typer.Option(help="Megatron's make_vocab_size_divisible_by.")] = 128,
    shard_size: Annotated[float, typer.Option(help="hf: GB of a file.")] = 5.0,
    from_: _From = "",
    family: _Family = "",
    model_config: _Config = None,
    step: _Step = None,
    vocab_size: _Vocab = None,
    option: _Option = None,
    workers: Annotated[int, typer.Option(help="Files written at a time.")] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the target.")] = False,
    digest: Annotated[str, typer.Option(help="Of each file, in the manifest: xxh3_128 or sha256.")] = "xxh3_128",
    verify: Annotated[bool, typer.Option("--verify", help="Check digests, tensors and logits afterwards.")] = False,
    trust_source: Annotated[
        bool, typer.Option("--trust-source", help="--verify may run Megatron's loader on the source.")
    ] = False,
) -> None:
    """Write SOURCE as another format or layout at TARGET. Nothing is at TARGET before all of it is."""
    from nxdt_nemo.checkpoint.convert import convert as run
    from nxdt_nemo.checkpoint.formats.base import Options, Target
    from nxdt_nemo.checkpoint.io.remote import path_of
    from nxdt_nemo.checkpoint.layout import Layout
    from nxdt_nemo.checkpoint.tensors import KINDS

    kinds = KINDS if with_optimizer else KINDS[:1]
    options = Options(from_, family, model_config, step, vocab_size, with_optimizer, _options(option))
    extra = {
        "optimizer_format": _one_of("--optimizer-format", optimizer_format, *_OPTIMIZER_FORMATS),
        "spec": _one_of("--spec", spec, "local", "te", "legacy"),
        "shard_size": int(shard_size * 1000**3),
        **_options(option),
    }
    layout = Layout(tp, pp, vpp, ep, etp, _numbers(stages))
    wanted = Target(layout, _dtype(dtype), kinds, _positive("--divisible-by", divisible_by), extra)
    with _progress() as progress:
        report = run(
            path_of(source),
            target,
            to,
            options,
            wanted,
            version=__version__,
            workers=_positive("--workers", workers),
            overwrite=overwrite,
            digest=_one_of("--digest", digest, "xxh3_128", "sha256"),
            progress=progress,
        )
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    resumed = f", {report.resumed} files from an earlier run" if report.resumed else ""
    what = f"{report.source.format} ({report.source.family.name}) as {to}"
    typer.echo(f"{what}: {_size(report.bytes)} in {report.seconds:.1f} s{resumed}; {report.target}")
    if verify:
        _verify(report, trust_source)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="The base model, of any format.", show_default=False)],
    adapter: Annotated[Path, typer.Argument(help="A .nemo of NeMo's LoRA, or a folder of peft.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not be there.", show_default=False)],
    to: Annotated[str, typer.Option(help="Format to write, as of convert.")] = "hf",
    dtype: Annotated[str, typer.Option(help="The weights': bf16, fp16 or fp32; as in BASE by default.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET when all is written.")] = False,
) -> None:
    """Write BASE with a LoRA adapter added to its weights: W + alpha / rank * B A."""
    from nxdt_nemo.checkpoint import adapters
    from nxdt_nemo.checkpoint.convert import convert as run
    from nxdt_nemo.checkpoint.formats.base import Source, Target

    def change(source: Source) -> None:
        adapters.merge_into(source, adapters.read(adapter, source))

    wanted = Target(dtype=_dtype(dtype))
    with _progress() as progress:
        report = run(
            base, target, to, wanted=wanted, version=__version__, overwrite=overwrite, progress=progress, change=change
        )
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    what = f"{report.source.format} ({report.source.family.name}) with its adapter as {to}"
    typer.echo(f"{what}: {_size(report.bytes)} in {report.seconds:.1f} s; {report.target}")


@app.command("adapter")
def export_adapter(
    base: Annotated[Path, typer.Argument(help="The base model, of any format.", show_default=False)],
    adapter: Annotated[Path, typer.Argument(help="A .nemo of NeMo's LoRA.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not be there.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET when all is written.")] = False,
) -> None:
    """Write a LoRA adapter as Hugging Face's peft loads it."""
    from nxdt_nemo.checkpoint import adapters, formats
    from nxdt_nemo.checkpoint.formats.base import Options

    source = formats.read(base, Options())
    found = adapters.read(adapter, source)
    adapters.write_peft(found, source, target, overwrite=overwrite, version=__version__)
    what = f"{len(found.pairs)} weights of {source.family.name}, rank {found.rank}, alpha {found.alpha:g}"
    typer.echo(f"LoRA as peft: {what}; {target}")


def _verify(report: Report, trusted: bool) -> None:
    from nxdt_nemo.audit.verify import verify

    failed = False
    for check in verify(report, trusted=trusted):
        state = {True: "ok", False: "WRONG", None: "skipped"}[check.ok]
        typer.echo(f"{check.what:8} {state}: {check.found}")
        failed |= check.ok is False
    if failed:
        raise typer.Exit(1)


def _one_of(option: str, value: str, *known: str) -> str:
    if value not in known:
        raise UserError(f"{value!r} is not known", place=option, fix=f"use {' or '.join(known)}")
    return value


def _positive(option: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{value} is not positive", place=option)
    return value


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"{text!r} is no list of numbers", place="--stages", fix="write it as 5,6,6,5") from None
    if any(n < 0 for n in found):
        raise UserError(f"{text!r} has a negative number", place="--stages")
    return found


def _dtype(name: str) -> Any:
    if not name:
        return None
    from nxdt_nemo.checkpoint.dtypes import dtype_of

    full = _DTYPES.get(name, name)
    return dtype_of(_one_of("--dtype", full, *_DTYPES.values()))


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes and time left, if someone is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, last = bar.add_task("", total=None), 0.0

        def show(done: int, total: int) -> None:
            nonlocal last
            if done == total or time.monotonic() - last > 0.1:
                last = time.monotonic()
                bar.update(task, completed=done, total=total)

        yield show
