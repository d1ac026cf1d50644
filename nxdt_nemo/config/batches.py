"""The rules of how a run comes to its batches: how many steps, when it validates, which sampler, a batch that grows.

Room config/ (leaf). Stands in for asserts and divisions by zero of NeMo's data sets and of megatron-core's
num_microbatches_calculator.py. May import the standard library. Proof: tests/config/test_batches.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nxdt_nemo.config.report import or_list
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["ERRORS"]

Errors = Iterator[ConfigError]

GLOBAL = "model.global_batch_size"


def _pretrains(view: View) -> bool:
    return view.training and view.has("trainer") and view.has("model.data.splits_string")


def steps(view: View) -> Errors:
    """Data sets are as long as the steps need: those of pretraining, rows of token ids, pairs of answers."""
    rows = view.get("model.data.data_impl") == "arrow"
    sized = _pretrains(view) or (view.training and view.has("trainer") and (rows or bool(view.preferences)))
    if sized and (view.number("trainer.max_steps") or 0) < 1:
        said = f"trainer.max_steps={view.get('trainer.max_steps', -1)}"
        yield view.error(f"{said}: NeMo builds as many samples as the steps need", "set the number of steps")


def fractions(view: View) -> Errors:
    """NeMo makes no step of a fraction of an epoch or a validation."""
    for key in ("trainer.limit_train_batches", "trainer.limit_val_batches"):
        value = view.get(key)
        if _pretrains(view) and isinstance(value, float) and 0.0 < value < 1.0:
            yield view.error(f"{key}={value}: NeMo 2.4 makes no batch of a fraction", "use a number of steps, or 1.0")


def validations(view: View) -> Errors:
    """NeMo divides the steps by the interval, also where nothing validates; Lightning does where something does."""
    key = "trainer.val_check_interval"
    divides = _pretrains(view) or (view.training and view.get("trainer.limit_val_batches", 1.0))
    if divides and view.get(key) == 0:
        yield view.error(f"{key}={view.get(key)} is no interval", "use 1 or more; trainer.limit_val_batches=0 for none")


def sampler(view: View) -> Errors:
    """NeMo's pretraining and pairs of answers are read by two samplers; tuning has one of its own."""
    key, known = "model.data.dataloader_type", ["single", "cyclic"]
    if view.get("model.mcore_bert", False):
        known.append("LDDL")
    value = view.get(key)
    if (_pretrains(view) or (view.training and view.preferences)) and value in ("batch", "LDDL") and value not in known:
        yield view.error(f"{key}={value} is no sampler of this model", f"use {or_list(known)}")


def growing(view: View) -> Errors:
    """A batch that grows: its first size, what is added, over how many samples; whole additions to the last size."""
    key = "model.rampup_batch_size"
    value, whole = view.get(key), view.number(GLOBAL)
    if value is None or not view.training:
        return
    numbers = [int(part) for part in value if str(part).isdigit()] if isinstance(value, list) else []
    said = f"{key}=[{','.join(map(str, value))}]" if isinstance(value, list) else f"{key}={value}"
    if len(numbers) != 3 or len(value) != 3 or min(numbers) < 1:
        yield view.error(f"{said} is not a first size, an increment and a number of samples", "write [32,32,10000]")
        return
    first, increment, _ = numbers
    if whole and (first >= whole or (whole - first) % increment):
        yield view.error(f"{said} does not come to {GLOBAL}={whole}", f"begin whole increments of {increment} below it")


ERRORS: tuple[Callable[[View], Errors], ...] = (steps, fractions, validations, sampler, growing)
