"""Is what a conversion wrote what it read? Digests, every tensor bit by bit, and logits by upstream's own code.

Room audit/. torch is loaded when it runs; upstream only in processes of its own (audit/logits/).
Proof: tests/checkpoint/test_cli.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxdt_nemo.errors import UserError

if TYPE_CHECKING:
    from nxdt_nemo.checkpoint.convert import Report

__all__ = ["TOLERANCE", "Check", "verify"]

TOLERANCE = 1e-5  # of logits computed in float32 from equal weights, in their largest absolute value
_MEGATRON = ("torch_dist", "torch")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ok None: it was not, and `found` says why."""

    what: str
    ok: bool | None
    found: str


def verify(report: Report, *, trusted: bool = False) -> Iterator[Check]:
    """Checks of a conversion, as they are done. Raises UserError if what it wrote cannot be read.

    trusted  run upstream's loaders on the source too: they execute what its pickles say
    """
    from nxdt_nemo.checkpoint import formats
    from nxdt_nemo.checkpoint.formats.base import Options
    from nxdt_nemo.checkpoint.output import check_manifest

    source, kinds = report.source, report.kinds
    wrong = check_manifest(report.target)
    yield Check("digests", not wrong, "; ".join(wrong[:3]) or "all files are as the manifest says")
    written = formats.read(report.target, Options(family=source.family.name, optimizer=len(kinds) > 1))
    yield _tensors(source, written, kinds)
    yield _logits(source, written, report.weights != written.dtype, trusted)


def _tensors(first: Any, second: Any, kinds: tuple[str, ...]) -> Check:
    """Every logical tensor of both, equal to the bit, or after the cast that was asked for."""
    from nxdt_nemo.checkpoint.boxes import Box
    from nxdt_nemo.checkpoint.dtypes import cast, same
    from nxdt_nemo.checkpoint.tensors import logical_of

    count, casts = 0, False
    for kind in kinds:
        for name in first.catalog.names(kind):
            logical = logical_of(name)
            shape = list(logical.size(first.model))
            if logical.shape.startswith("V"):
                shape[0] = first.model.vocab  # the rest is padding
            box = Box((0,) * len(shape), tuple(shape))
            wants = [side.catalog.part(kind, name, box) for side in (first, second)]
            one, other = wants
            casts |= one.dtype != other.dtype
            if not same(cast(one.tensor(), one.dtype, other.dtype), other.tensor()):
                return Check("tensors", False, f"{kind} of {name} is not the same")
            count += 1
    return Check("tensors", True, f"{count} equal" + (" after the cast to another dtype" if casts else " to the bit"))


def _logits(first: Any, second: Any, cast: bool, trusted: bool) -> Check:
    import torch

    what = "logits"
    if not _is_hf(first) and not trusted:
        return Check(what, None, "Megatron's loader would run what the source's pickles say: --trust-source")
    if first.model.token_types or first.model.decoder_layers:
        return Check(what, None, f"not for {first.family.name}")
    if cast:
        return Check(what, None, "the weights were cast")
    if unread := [side.format for side in (first, second) if not _is_hf(side) and _megatron(side) is None]:
        return Check(what, None, f"no loader of upstream's is run on {unread[0]}")
    if not isinstance(first.path, Path):
        return Check(what, None, "the source is at a URL, where upstream's code does not read")
    with tempfile.TemporaryDirectory() as place:
        found = [
            _run(side, Path(place) / f"{number}.pt", first.model.vocab) for number, side in enumerate((first, second))
        ]
        one, other = (torch.load(at, weights_only=True)[..., : first.model.vocab] for at in found)
    error, largest = float((one - other).abs().max()), float(one.abs().max())
    limit = TOLERANCE * max(1.0, largest)
    said = f"worst difference {error:.1e}, largest logit {largest:.1f}, tolerance {limit:.0e}"
    return Check(what, bool(error <= limit), f"{_name(first)} against {_name(second)}: {said}")


def _is_hf(side: Any) -> bool:
    return str(side.format) == "hf"


def _megatron(side: Any) -> tuple[str, Path] | None:
    """The format and the folder that megatron-core's own loaders take; None if there are none for it."""
    if side.format in _MEGATRON and not side.training.args.get("use_legacy_models"):
        return side.format, side.path
    folders = {"nemo": "model_weights", "nemo2": "weights", "nemo_dist": "."}
    folder = side.path / folders.get(side.format, "")
    there = side.format in folders and (folder / ".metadata").is_file()
    return ("torch_dist", folder) if there else None


def _name(side: Any) -> str:
    return "transformers" if _is_hf(side) else "megatron-core"


def _run(side: Any, out: Path, vocab: int) -> Path:
    """Logits of one side, by a process of upstream's."""
    found = _megatron(side)
    arguments = ["-m", f"nxdt_nemo.audit.logits.{'megatron' if found else 'hf'}"]
    if found:
        layout = dataclasses.asdict(side.layout)
        model = dataclasses.asdict(side.model) | layout | {"vocab": vocab, "prefix": side.detail.get("prefix", "")}
        model["padded_vocab"] = side.model.padded_vocab or side.model.vocab
        numbers = out.with_suffix(".json")
        numbers.write_text(json.dumps(model))
        arguments += [found[0], str(found[1]), str(numbers), str(out)]
    else:
        arguments += [str(side.path), str(out)]
    environment = {**os.environ, "NXDT_NEMO": "0"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{_name(side)} cannot load it: {last[:300]}", place=str(side.path))
    return out
