"""Rows of a parity table: run the reference and our side, and say how far apart they are.

Room testing/. The parent needs torch only to hold tensors. Used by tests/megatron/test_parity.py and tools/parity.py.
Proof: tests/testing/test_parity_rows.py.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxdt_nemo.testing import neuron_standin, ours
from nxdt_nemo.testing.matrix import NEURON_TOLERANCE, TOLERANCE, NemoRow, recipe_of
from nxdt_nemo.testing.mistakes import Fault
from nxdt_nemo.testing.nemo_run import NemoPart
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pool import RankPool, RankPools
from nxdt_nemo.testing.recipe import Family, Layout, Recipe
from nxdt_nemo.testing.reference import STOCK_ENV, Trained

if TYPE_CHECKING:
    import torch

    from nxdt_nemo.testing.traced import Traced

__all__ = ["NO_CLIPPING", "Errors", "Parity", "Row", "errors", "relative", "traced_errors"]

NO_CLIPPING = 1e9  # a recipe's clip that no norm reaches


@dataclass(frozen=True)
class Errors:
    """The worst of each kind; every number is relative.

    loss, norm  of any step: |a - b| / |b|
    grad        of any parameter's step-1 gradient: max |a - b| / max |b|, and whose it is
    copies      between two ranks' copies of one gradient
    """

    loss: float
    norm: float
    grad: float
    copies: float
    where: str

    @property
    def worst(self) -> float:
        """The one that the tolerance is held against."""
        return max(self.kinds)

    @property
    def kinds(self) -> tuple[float, float, float, float]:
        """loss, norm, grad, copies."""
        return self.loss, self.norm, self.grad, self.copies

    def times(self, factor: float) -> Errors:
        """Limits of this size times a factor; copies may not differ at all."""
        return Errors(self.loss * factor, self.norm * factor, self.grad * factor, 0.0, f"{factor:g} x {self.where}")


@dataclass(frozen=True)
class Row:
    """One line: what was compared with what, and whether it should agree."""

    family: str
    left: str
    right: str
    tolerance: float | Errors
    errors: Errors
    must_fail: bool = False

    @property
    def within(self) -> bool:
        """True when every error is within the tolerance, or each kind within its own."""
        if isinstance(self.tolerance, Errors):
            return all(mine <= limit for mine, limit in zip(self.errors.kinds, self.tolerance.kinds, strict=True))
        return self.errors.worst <= self.tolerance

    @property
    def good(self) -> bool:
        """True when the row is as it must be: a negative control has to be outside."""
        return self.within != self.must_fail

    @property
    def verdict(self) -> str:
        """In words."""
        if self.must_fail:
            return "green, and must not be" if self.within else "red, as it must"
        return "green" if self.within else "RED"


def relative(left: Sequence[float], right: Sequence[float]) -> float:
    """The worst |a - b| / |b|; infinite when the lengths differ or a number is not finite."""
    if len(left) != len(right) or not left or not all(math.isfinite(x) for x in [*left, *right]):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(left, right, strict=True))


def traced_errors(parts: Sequence[Traced], expected: Trained) -> tuple[float, float]:
    """Ranks of a lane that traces against the first steps of a run: of the losses, a mean over the ranks that have
    some, and of each rank's gradient norms."""
    losses = [sum(step) / len(step) for step in zip(*(part.losses for part in parts if part.losses), strict=True)]
    steps = len(parts[0].grad_norms)
    norms = max(relative(part.grad_norms, expected.grad_norms[:steps]) for part in parts)
    return relative(losses, expected.losses[:steps]), norms


def _marks(recipe: Recipe) -> list[str]:
    """What a row's name says of its recipe."""
    marks = {"bf16": recipe.dtype == "bfloat16", "no clipping": recipe.clip >= NO_CLIPPING}
    return [mark for mark, true in marks.items() if true]


def errors(left: Trained, right: Trained, copies: float = 0.0) -> Errors:
    """Left against right. A gradient that one side lacks is an infinite error."""
    found = _gradient_errors(left.grads, right.grads)
    where = max(found, key=lambda name: found[name])
    return Errors(
        relative(left.losses, right.losses), relative(left.grad_norms, right.grad_norms), found[where], copies, where
    )


def _gradient_errors(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> dict[str, float]:
    found = dict.fromkeys(left.keys() ^ right.keys(), math.inf)
    for name in left.keys() & right.keys():
        a, b = left[name].double(), right[name].double()
        error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.shape == b.shape else math.inf
        found[name] = error if math.isfinite(error) else math.inf
    return found


@dataclass
class Parity:
    """Runs each side once for each recipe and layout, on pools that are kept. Close it, or use `with`.

    pools  of others, which they close; without, its own
    """

    timeout: float = 300.0
    pools: RankPools | None = None
    _own: RankPools = field(default_factory=RankPools, repr=False)
    _weights: dict[Recipe, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    _stock: dict[Recipe, Trained] = field(default_factory=dict, repr=False)
    _ours: dict[tuple[Any, ...], tuple[Trained, float]] = field(default_factory=dict, repr=False)
    _bytes: dict[tuple[Recipe, Layout], list[int]] = field(default_factory=dict, repr=False)
    _nemo: dict[tuple[Any, ...], tuple[Trained, float, NemoPart]] = field(default_factory=dict, repr=False)
    _nemo_bytes: dict[tuple[Any, ...], list[int]] = field(default_factory=dict, repr=False)
    _folders: dict[Recipe, tempfile.TemporaryDirectory[str]] = field(default_factory=dict, repr=False)

    def __enter__(self) -> Parity:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all ranks of its own."""
        self._own.close()
        while self._folders:
            self._folders.popitem()[1].cleanup()

    def weights(self, recipe: Recipe) -> dict[str, torch.Tensor]:
        """The undivided model's initial weights."""
        if recipe not in self._weights:
            self._weights[recipe] = self._run_stock("reference:initial_weights", recipe)
        return self._weights[recipe]

    def stock(self, recipe: Recipe) -> Trained:
        """Upstream on one rank."""
        if recipe not in self._stock:
            self._stock[recipe] = self._run_stock("reference:train", recipe, self.weights(recipe))
        return self._stock[recipe]

    def ours(self, recipe: Recipe, layout: Layout, fault: Fault = "", **fields: Any) -> tuple[Trained, float]:
        """The backend in a layout, and how far copies of gradients differ between its ranks.

        fields  further ones of the TransformerConfig
        """
        key = (recipe, layout, fault, tuple(sorted(fields.items())))
        if key not in self._ours:
            arguments = (recipe, self.weights(recipe), layout, fault, None, None, None, None, fields)
            parts = self._run_ours(layout, *arguments)
            self._ours[key] = ours.assemble(parts)
            self._bytes[recipe, layout] = [part.state_bytes for part in parts]
        return self._ours[key]

    def leg(
        self,
        recipe: Recipe,
        layout: Layout,
        steps: range,
        *,
        resume: Path | None = None,
        save: Path | None = None,
        fault: Fault = "",
        **ddp: Any,
    ) -> Trained:
        """Some steps of a run of ours, from a checkpoint, to a checkpoint. Not kept.

        ddp  further fields of megatron-core's DistributedDataParallelConfig
        """
        arguments = (recipe, self.weights(recipe), layout, fault, steps, resume, save, ddp)
        return ours.assemble(self._run_ours(layout, *arguments))[0]

    def stock_leg(
        self, recipe: Recipe, steps: range, *, resume: Path | None = None, save: Path | None = None
    ) -> Trained:
        """As leg, of upstream on one rank, with upstream's own writer and reader."""
        arguments = (recipe, self.weights(recipe), None, None, "matrices", steps, resume, save)
        trained: Trained = self._run_stock("reference:train", *arguments)
        return trained

    def state_bytes(self, recipe: Recipe, layout: Layout) -> list[int]:
        """Each rank's bytes of optimizer state, after a run in a layout."""
        self.ours(recipe, layout)
        return self._bytes[recipe, layout]

    def zero_against_unsharded(
        self, recipe: Recipe, layout: Layout, tolerance: float | Errors, fault: Fault = ""
    ) -> Row:
        """The sharded optimizer, against the unsharded one in the same layout; with a fault the row must fail."""
        mine, copies = self.ours(recipe, replace(layout, zero=True), fault)
        plain, _ = self.ours(recipe, layout)
        left = ", ".join([str(replace(layout, zero=True)), *_marks(recipe), *filter(None, [fault])])
        return Row(recipe.family, left, f"{layout}", tolerance, errors(mine, plain, copies), bool(fault))

    def nemo(
        self, recipe: Recipe, layout: Layout, *, split_sums: bool = False, **changes: Any
    ) -> tuple[Trained, float, NemoPart]:
        """NeMo on the backend, in ranks of its own; how far copies differ; and rank 0's part (its data and rates).

        changes  dotted keys of NeMo's configuration, with __ for the dot: model__grad_div_ar_fusion=True
        """
        key = (recipe, layout, split_sums, tuple(sorted(changes.items())))
        if key not in self._nemo:
            dotted = {name.replace("__", "."): value for name, value in changes.items()}
            arguments = (recipe, self.weights(recipe), layout, self._text(recipe), dotted, split_sums)
            with RankPool(layout.world, env=ACTIVE_ENV, init=ACTIVE, group=False, timeout=self.timeout) as pool:
                parts = pool.run("nxdt_nemo.testing.nemo_run:train", *arguments)
            self._nemo[key] = (*ours.assemble(parts), parts[0])
            self._nemo_bytes[key] = [part.state_bytes for part in parts]
        return self._nemo[key]

    def nemo_state_bytes(self, recipe: Recipe, layout: Layout, **changes: Any) -> list[int]:
        """Each rank's bytes of optimizer state, after a run of NeMo."""
        self.nemo(recipe, layout, **changes)
        return self._nemo_bytes[recipe, layout, False, tuple(sorted(changes.items()))]

    def nemo_zero_against_unsharded(
        self, recipe: Recipe, layout: Layout, name: str, tolerance: float | Errors, **changes: Any
    ) -> Row:
        """NeMo with optim.name `name`, against NeMo with fused_adam in the same layout."""
        mine, copies, _ = self.nemo(recipe, layout, model__optim__name=name, **changes)
        plain, _, _ = self.nemo(recipe, layout)
        keys = [key.split("__")[-1] for key in changes]
        left = ", ".join([f"NeMo {layout}", name, *keys, *_marks(recipe)])
        return Row(recipe.family, left, f"NeMo {layout}, fused_adam", tolerance, errors(mine, plain, copies))

    def nemo_against_stock(self, recipe: Recipe, tolerance: float) -> Row:
        """NeMo on one rank, against stock megatron-core fed with the batches and rates that NeMo used."""
        mine, copies, part = self.nemo(recipe, Layout())
        arguments = (recipe, self.weights(recipe), part.batches, part.lrs, "all but biases")
        theirs = self._run_stock("reference:train", *arguments)
        return Row(recipe.family, "NeMo, one rank", "megatron-core, replayed", tolerance, errors(mine, theirs, copies))

    def nemo_against_one_rank(self, recipe: Recipe, layout: Layout, tolerance: float | Errors, **changes: Any) -> Row:
        """NeMo in a layout, against NeMo on one rank."""
        mine, copies, _ = self.nemo(recipe, layout, **changes)
        one, _, _ = self.nemo(recipe, Layout())
        keys = "".join(f", {name.split('__')[-1]}" for name in changes)
        left = f"NeMo {layout}{keys}{', bf16' if recipe.dtype == 'bfloat16' else ''}"
        return Row(recipe.family, left, "NeMo, one rank", tolerance, errors(mine, one, copies))

    def nemo_row(self, row: NemoRow) -> Row:
        """A row of matrix.NEMO: in bf16 within twice what another order of sums changes."""
        recipe, place = row.recipe()
        limits = self.order_noise(recipe).times(2) if row.half else TOLERANCE
        changes = {} if row.optimizer == "fused_adam" else {"model__optim__name": row.optimizer}
        return self.nemo_against_one_rank(recipe, place, limits, **changes)

    def order_noise(self, recipe: Recipe) -> Errors:
        """What adding the same products up in another order changes on one rank: the dtype's own error."""
        other, _, _ = self.nemo(recipe, Layout(), split_sums=True)
        return replace(errors(other, self.nemo(recipe, Layout())[0]), where="another order of sums")

    def _text(self, recipe: Recipe) -> Path:
        if recipe not in self._folders:
            self._folders[recipe] = tempfile.TemporaryDirectory(prefix="nxdt_nemo_text_")
            self._run_stock("nemo_run:write_text", recipe, Path(self._folders[recipe].name))
        return Path(self._folders[recipe].name)

    def against_stock(self, recipe: Recipe, tolerance: float) -> Row:
        """Ours on one rank, against upstream."""
        mine, copies = self.ours(recipe, Layout())
        return Row(
            recipe.family, "ours, one rank", "megatron-core", tolerance, errors(mine, self.stock(recipe), copies)
        )

    def against_one_rank(self, recipe: Recipe, layout: Layout, tolerance: float, fault: Fault = "") -> Row:
        """Ours in a layout, against ours on one rank; with a fault the row must fail."""
        mine, copies = self.ours(recipe, layout, fault)
        one, _ = self.ours(recipe, Layout())
        left = f"{layout}, {fault}" if fault else str(layout)
        return Row(recipe.family, left, "ours, one rank", tolerance, errors(mine, one, copies), bool(fault))

    def neuron_row(self, family: Family, name: str, fault: Fault = "") -> Row:
        """A row of matrix.NEURON: ours on the neuron lane's stand-in, against the cpu lane in the same layout."""
        recipe, place = recipe_of(family, name, steps=10)
        recipe = replace(recipe, layers=2)
        env = neuron_standin.environment(neuron_standin.installed()) | {"NXDT_NEMO": "0"}
        parts = self._run(
            place.world,
            "nxdt_nemo.testing.ours:train",
            *(recipe, self.weights(recipe), place, fault),
            init=ACTIVE,
            env=env,
            group=False,
            timeout=2 * self.timeout,
        )
        mine, copies = ours.assemble(parts)
        left = ", ".join(filter(None, [f"neuron stand-in, {place}", *_marks(recipe), fault]))
        theirs, _ = self.ours(recipe, place)
        return Row(family, left, f"cpu lane, {place}", NEURON_TOLERANCE, errors(mine, theirs, copies), bool(fault))

    def _run_ours(self, layout: Layout, *arguments: Any) -> list[Any]:
        function = "nxdt_nemo.testing.ours:train"
        return self._run(layout.world, function, *arguments, init=ACTIVE, env=ACTIVE_ENV)

    def _run_stock(self, function: str, *arguments: Any) -> Any:
        [found] = self._run(1, f"nxdt_nemo.testing.{function}", *arguments, env=STOCK_ENV)
        return found

    def _run(self, *arguments: Any, timeout: float | None = None, **named: Any) -> list[Any]:
        return (self.pools or self._own)(*arguments, timeout=timeout or self.timeout, **named)
