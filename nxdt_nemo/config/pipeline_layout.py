"""Which layers a pipeline stage has: megatron-core's layout string, and NxD Training's cuts.

Room config/ (leaf). Stands in for asserts of megatron.core.transformer.pipeline_parallel_layer_layout, which come on
every rank. `model.pipeline_cuts` names the last layer of each stage but the last one; it becomes
`model.pipeline_model_parallel_layout`, as in "Ett|tttL": E embedding, t layer, L loss, | between stages.
May import the standard library and nxdt_nemo.errors. Proof: tests/config/test_pipeline_layout.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from nxdt_nemo.config.report import Change
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["CHANGES", "CUTS", "ERRORS", "LAYOUT", "given", "text_of"]

Errors = Iterator[ConfigError]

LAYOUT = "model.pipeline_model_parallel_layout"
CUTS = "model.pipeline_cuts"
PP = "model.pipeline_model_parallel_size"
VPP = "model.virtual_pipeline_model_parallel_size"
OTHERS = (
    "model.num_layers_in_first_pipeline_stage",
    "model.num_layers_in_last_pipeline_stage",
    "model.account_for_embedding_in_pipeline_split",
    "model.account_for_loss_in_pipeline_split",
)


def given(view: View) -> bool:
    """True if the config says which layers a stage has."""
    return view.get(LAYOUT) is not None or view.get(CUTS) is not None


def text_of(layers: Sequence[int]) -> str:
    """megatron-core's string for these numbers of layers, a stage (or chunk) each."""
    return f"E{'|'.join('t' * count for count in layers)}L"


def conflicts(view: View) -> Errors:
    """One way to say it."""
    said = [key for key in (LAYOUT, CUTS, *OTHERS) if view.get(key) not in (None, False)]
    if given(view) and len(said) > 1:
        yield view.error(f"{said[0]} with {said[1]}: both say which layers a stage has", "use one of them")


def cuts(view: View) -> Errors:
    """Names of layers, ascending, one less than there are stages."""
    value, layers, stages = view.get(CUTS), view.number("model.num_layers"), _stages(view)
    if value is None or layers is None:
        return
    found = _cut_layers(value)
    if found is None:
        yield view.error(f"{CUTS}={value} is not a list of layers", "name the last layer of each stage: model.layers.1")
    elif len(found) != stages - 1:
        reason = f"{CUTS} has {len(found)} cuts for {stages} stages ({PP} x {VPP})"
        yield view.error(reason, f"name the last layer of each stage but the last one: {stages - 1}")
    elif any(low >= high for low, high in pairwise([-1, *found, layers - 1])):
        reason = f"{CUTS}: layers {found} are not ascending between 0 and {layers - 2}"
        yield view.error(reason, f"model.num_layers={layers}: leave each stage a layer, or use {LAYOUT}")


def layout(view: View) -> Errors:
    """What megatron-core asserts of a layout."""
    value, layers, size = view.get(LAYOUT), view.number("model.num_layers"), view.size(PP)
    if value is None or layers is None:
        return
    if not isinstance(value, str):
        yield view.error(f"{LAYOUT}={value} is not a text", "write it as Ett|tttL")
        return
    stages = _unrolled(value).split("|")
    whole = "".join(stages)
    if wrong := set(whole) - set("EtL"):
        said = "m (multi-token prediction) is not supported" if wrong == {"m"} else f"{min(wrong)!r} is not a layer"
        yield view.error(f"{LAYOUT}={value}: {said}", "use E, t, L and | as in Ett|tttL")
    elif whole != f"E{'t' * layers}L":
        reason = f"{LAYOUT}={value} has {whole.count('t')} layers of model.num_layers={layers}"
        yield view.error(reason, "begin with E, end with L, and have a t for each layer between them")
    elif len(stages) % size or len(stages) // size != max(1, view.number(VPP) or 1):
        chunks = f"use {VPP}={len(stages) // size}" if len(stages) % size == 0 else f"use a multiple of {size} parts"
        yield view.error(
            f"{LAYOUT}={value} has {len(stages)} parts for {size} stages and {VPP}={view.get(VPP)}", chunks
        )


def cuts_as_layout(view: View) -> Iterator[Change]:
    """NxD Training's key as megatron-core's."""
    found, layers = _cut_layers(view.get(CUTS)), view.number("model.num_layers")
    if found is None or layers is None:
        return
    counts = [high - low for low, high in pairwise([-1, *found, layers - 1])]
    yield Change(LAYOUT, view.get(LAYOUT), text_of(counts), "megatron-core's way to say NxD Training's pipeline_cuts")
    yield Change(CUTS, view.get(CUTS), None, f"became {LAYOUT.removeprefix('model.')}")


def _stages(view: View) -> int:
    return view.size(PP) * max(1, view.number(VPP) or 1)


def _cut_layers(value: object) -> list[int] | None:
    """The numbers of the layers that are named; None if these are no names of layers."""
    if not isinstance(value, list) or not value:
        return None
    numbers = [re.search(r"\.(\d+)$", str(name)) for name in value]
    return [int(found[1]) for found in numbers if found] if all(numbers) else None


def _unrolled(text: str) -> str:
    """The layout with its multiplications written out: Et*2|(t|)*2L is Ett|t|t|L."""
    text = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda found: found[1] * int(found[2]), text)
    return text


ERRORS: tuple[Callable[[View], Errors], ...] = (conflicts, cuts, layout)
CHANGES: tuple[Callable[[View], Iterator[Change]], ...] = (cuts_as_layout,)
