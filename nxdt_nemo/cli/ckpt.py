"""`nxdt-nemo ckpt`: what is in a checkpoint, and another one made of it.

Room cli/. Imports argparse and no typer, which takes as long to start as numpy does: a conversion is timed beside `cp`.
rich and the checkpoint room are loaded by the command that needs them. Proof: tests/checkpoint/test_cli.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nxdt_nemo import __version__
from nxdt_nemo.errors import UserError

if TYPE_CHECKING:
    from nxdt_nemo.checkpoint.convert import Report
    from nxdt_nemo.checkpoint.formats.base import Options

__all__ = ["main"]

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_OPTIMIZER_FORMATS = ("fully_sharded_model_space", "model_space", "distrib_optim")
_SHOWN = 40  # tensors that are listed unless --all


def main(arguments: Sequence[str]) -> NoReturn:
    """Run `nxdt-nemo ckpt ARGUMENTS`. Ends with SystemExit, or UserError."""
    given = _parser().parse_args(arguments)
    gc.disable()  # a plan is tens of thousands of boxes without cycles, and the process ends with it
    try:
        code = given.run(given)
        sys.stdout.flush()  # while a closed pipe can still be answered
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # by `| head`: nor may Python say so when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    finally:
        gc.enable()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nxdt-nemo ckpt", description="Checkpoints: inspect, convert, merge adapters.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, add in (
        ("inspect", inspect, _add_inspect),
        ("convert", convert, _add_convert),
        ("merge", merge, _add_merge),
        ("adapter", export_adapter, _add_adapter),
    ):
        said = (run.__doc__ or "").strip()
        command = commands.add_parser(name, help=said, description=said, allow_abbrev=False)
        command.set_defaults(run=run)
        add(command)
    return parser


def _add_source(command: argparse.ArgumentParser) -> None:
    """What is said about a source, by more than one command."""
    add = command.add_argument
    add("--from", dest="from_", default="", metavar="FORMAT", help="The source's format, if it is not to be found out.")
    add("--family", default="", help="The model's family, if the source does not tell.")
    said = "A config.json, for sources that do not say what the model is."
    add("--model-config", type=Path, metavar="FILE", help=said)
    add("--step", type=int, help="The iteration to read; the latest by default.")
    add("--vocab-size", type=int, metavar="ROWS", help="Rows that mean a token; further ones are padding.")
    said = "KEY=VALUE, of one format: hw_backend=trn1, xser=true. See docs/checkpoint_formats.md."
    add("--option", action="append", metavar="KEY=VALUE", help=said)


def _add_inspect(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("path", metavar="PATH", help="A checkpoint's folder, or its URL.")
    add("--json", dest="as_json", action="store_true", help="Print JSON: all there is.")
    add("--all", dest="every", action="store_true", help="List every tensor.")
    _add_source(command)


def _add_convert(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("source", metavar="SOURCE", help="The checkpoint to read, or its URL.")
    add("target", metavar="TARGET", type=Path, help="The folder to write; it must not be there.")
    formats = "hf, hf_bin, torch_dist, torch, nemo, nemo2, nemo_dist, ptl, nnm, nxdt"
    add("--to", required=True, metavar="FORMAT", help=f"Format to write: {formats}.")
    add("--tp", type=int, default=1, help="Tensor parallel size.")
    add("--pp", type=int, default=1, help="Pipeline stages.")
    add("--vpp", type=int, default=1, help="Virtual stages of each stage.")
    add("--ep", type=int, default=1, help="Expert parallel size.")
    add("--etp", type=int, default=0, help="Tensor parallel size of experts; 0 for --tp.")
    add("--stages", default="", metavar="LAYERS", help="Layers of each stage if they differ: 5,6,6,5.")
    add("--dtype", default="", help="bf16, fp16 or fp32; as the source's by default.")
    add("--with-optimizer", action="store_true", help="Take optimizer state along.")
    said = (
        "torch_dist: fully_sharded_model_space (Megatron's distributed; the default) or model_space; torch: "
        "distrib_optim for Megatron's distributed, else the other."
    )
    add("--optimizer-format", default=_OPTIMIZER_FORMATS[0], metavar="NAME", help=said)
    said = "Layer spec of the run that loads it, local (the default) or te; torch: legacy for old names."
    add("--spec", default="local", help=said)
    add("--divisible-by", type=int, default=128, metavar="ROWS", help="Megatron's make_vocab_size_divisible_by.")
    add("--shard-size", type=float, default=5.0, metavar="GB", help="hf: GB of a file.")
    add("--workers", type=int, default=4, help="Files made at a time.")
    add("--overwrite", action="store_true", help="Replace what is at the target.")
    add("--digest", default="xxh3_128", help="Of each file, in the manifest: xxh3_128 or sha256.")
    add("--verify", action="store_true", help="Check digests, tensors and logits afterwards.")
    add("--trust-source", action="store_true", help="--verify may run Megatron's loader on the source.")
    _add_source(command)


def _add_adapted(command: argparse.ArgumentParser, adapter: str) -> None:
    add = command.add_argument
    add("base", metavar="BASE", type=Path, help="The base model, of any format.")
    add("adapter", metavar="ADAPTER", type=Path, help=adapter)
    add("target", metavar="TARGET", type=Path, help="The folder to write; it must not be there.")
    add("--overwrite", action="store_true", help="Replace TARGET when all is written.")


def _add_merge(command: argparse.ArgumentParser) -> None:
    _add_adapted(command, "A .nemo of NeMo's LoRA, or a folder of peft.")
    command.add_argument("--to", default="hf", metavar="FORMAT", help="Format to write, as of convert; hf by default.")
    command.add_argument("--dtype", default="", help="The weights': bf16, fp16 or fp32; as in BASE by default.")


def _add_adapter(command: argparse.ArgumentParser) -> None:
    _add_adapted(command, "A .nemo of NeMo's LoRA.")


def _source_options(given: argparse.Namespace, optimizer: bool = False) -> Options:
    from nxdt_nemo.checkpoint.formats.base import Options

    extra = _options(given.option)
    return Options(given.from_, given.family, given.model_config, given.step, given.vocab_size, optimizer, extra)


def inspect(given: argparse.Namespace) -> None:
    """Format, model, layout, tensors and where they lie, optimizer, progress, what is suspicious. Reads no tensor."""
    from nxdt_nemo.checkpoint.inspect import inspect as look
    from nxdt_nemo.checkpoint.inspect import summary
    from nxdt_nemo.checkpoint.io.remote import path_of

    found = summary(look(path_of(given.path), _source_options(given)))
    if given.as_json:
        print(json.dumps(found, indent=2, default=str))
    else:
        print("\n".join(_lines(found, given.every)))


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
    if context := found["detail"].get("nemo2_context"):
        yield "context    " + ", ".join(name.rpartition(".")[2] for name in context.values() if name)
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


def convert(given: argparse.Namespace) -> int:
    """Write SOURCE as another format or layout at TARGET. Nothing is at TARGET before all of it is."""
    from nxdt_nemo.checkpoint.convert import convert as run
    from nxdt_nemo.checkpoint.formats.base import Target
    from nxdt_nemo.checkpoint.io.remote import path_of
    from nxdt_nemo.checkpoint.layout import Layout
    from nxdt_nemo.checkpoint.tensors import KINDS

    kinds = KINDS if given.with_optimizer else KINDS[:1]
    options = _source_options(given, given.with_optimizer)
    extra = {
        "optimizer_format": _one_of("--optimizer-format", given.optimizer_format, *_OPTIMIZER_FORMATS),
        "spec": _one_of("--spec", given.spec, "local", "te", "legacy"),
        "shard_size": int(given.shard_size * 1000**3),
        **options.extra,
    }
    layout = Layout(given.tp, given.pp, given.vpp, given.ep, given.etp, _numbers(given.stages))
    wanted = Target(layout, _dtype(given.dtype), kinds, _positive("--divisible-by", given.divisible_by), extra)
    with _progress() as progress:
        report = run(
            path_of(given.source),
            given.target,
            given.to,
            options,
            wanted,
            version=__version__,
            workers=_positive("--workers", given.workers),
            overwrite=given.overwrite,
            digest=_one_of("--digest", given.digest, "xxh3_128", "sha256"),
            progress=progress,
        )
    _say(report, f"as {given.to}")
    return _verify(report, given.trust_source) if given.verify else 0


def _say(report: Report, what: str) -> None:
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    resumed = f", {report.resumed} files from an earlier run" if report.resumed else ""
    source = f"{report.source.format} ({report.source.family.name})"
    print(f"{source} {what}: {_size(report.bytes)} in {report.seconds:.1f} s{resumed}; {report.target}")


def merge(given: argparse.Namespace) -> None:
    """Write BASE with a LoRA adapter added to its weights: W + alpha / rank * B A."""
    from nxdt_nemo.checkpoint import adapters
    from nxdt_nemo.checkpoint.convert import convert as run
    from nxdt_nemo.checkpoint.formats.base import Source, Target

    def change(source: Source) -> None:
        adapters.merge_into(source, adapters.read(given.adapter, source))

    wanted = Target(dtype=_dtype(given.dtype))
    with _progress() as progress:
        report = run(
            given.base,
            given.target,
            given.to,
            wanted=wanted,
            version=__version__,
            overwrite=given.overwrite,
            progress=progress,
            change=change,
        )
    _say(report, f"with its adapter as {given.to}")


def export_adapter(given: argparse.Namespace) -> None:
    """Write a LoRA adapter as Hugging Face's peft loads it."""
    from nxdt_nemo.checkpoint import adapters, formats
    from nxdt_nemo.checkpoint.formats.base import Options

    source = formats.read(given.base, Options())
    found = adapters.read(given.adapter, source)
    adapters.write_peft(found, source, given.target, overwrite=given.overwrite, version=__version__)
    what = f"{len(found.pairs)} weights of {source.family.name}, rank {found.rank}, alpha {found.alpha:g}"
    print(f"LoRA as peft: {what}; {given.target}")


def _verify(report: Report, trusted: bool) -> int:
    """The exit code: 1 if something is wrong."""
    from nxdt_nemo.audit.verify import verify

    gc.enable()  # models, unlike plans, are full of cycles
    failed = False
    for check in verify(report, trusted=trusted):
        state = {True: "ok", False: "WRONG", None: "skipped"}[check.ok]
        print(f"{check.what:8} {state}: {check.found}")
        failed |= check.ok is False
    return int(failed)


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
