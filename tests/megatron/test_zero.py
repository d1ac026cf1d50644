"""ZeRO-1 against the unsharded optimizer in the same layout; its memory; its checkpoints in other layouts.

A plain megatron-core loop. The same through NeMo: tests/nemo/test_zero.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nxdt_nemo.testing.parity import Parity, relative
from nxdt_nemo.testing.recipe import FAMILIES, Recipe, layout

pytestmark = pytest.mark.ranks

FAST = [(family, "dp2") for family in FAMILIES]
SLOW = [(family, name) for family in FAMILIES for name in ("dp4", "tp2dp2", "tp2spdp2", "pp2dp2")]
LOADED_IN = ["one", "one+zero", "dp2", "tp2+zero", "pp2+zero"]
LOADED_IN_4 = ["dp4+zero", "tp2dp2+zero", "pp2dp2+zero"]
MOMENTS = {"exp_avg", "exp_avg_sq"}


@pytest.fixture(scope="module")
def parity() -> Iterator[Parity]:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    with Parity() as session:
        yield session


@pytest.mark.parametrize(("family", "name"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_sharded_equals_unsharded(parity, family, name):
    row = parity.zero_against_unsharded(Recipe.of(family), layout(name), 1e-6)
    assert row.good, row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_clipping_it_is_the_same_to_the_bit(parity, dtype):
    """Two ranks' gradients add up the same way in a reduce-scatter; only the norm is summed in another order."""
    recipe = Recipe.of("gpt", dtype=dtype, clip=1e9)
    row = parity.zero_against_unsharded(recipe, layout("dp2"), 1e-6)
    assert (row.errors.loss, row.errors.grad, row.errors.copies) == (0.0, 0.0, 0.0), row
    mine, plain = (parity.ours(recipe, replace(layout("dp2"), zero=zero))[0].weights for zero in (True, False))
    assert all(torch.equal(mine[name], plain[name]) for name in plain)


def test_a_mistake_shows(parity):
    row = parity.against_one_rank(Recipe.of("gpt"), layout("dp2+zero"), 1e-6, "one gradient x 1.01")
    assert row.verdict == "red, as it must", row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_holds_its_part_of_the_state(parity, ranks, dtype):
    recipe = Recipe.of("gpt", dtype=dtype)
    [whole] = parity.state_bytes(recipe, layout("one"))
    mine = parity.state_bytes(recipe, layout(f"dp{ranks}+zero"))
    assert max(mine) * ranks <= 1.01 * whole, (mine, whole)
    assert sum(mine) >= whole  # nothing is missing either
    per_parameter = {"float32": 8, "bfloat16": 12}[dtype]
    assert whole == per_parameter * sum(weight.numel() for weight in parity.weights(recipe).values())


@pytest.fixture(scope="module")
def saved(parity, tmp_path_factory) -> dict[str, Any]:
    """By dtype: a run of six steps on two ranks, sharded, and a checkpoint after three of them."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path_factory.mktemp("zero") / dtype
        recipe = Recipe.of("llama", steps=6, dtype=dtype)
        whole = parity.leg(recipe, layout("dp2+zero"), range(6))
        parity.leg(recipe, layout("dp2+zero"), range(3), save=folder)
        found[dtype] = SimpleNamespace(folder=folder, recipe=recipe, whole=whole)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_in_its_own_layout_to_the_bit(parity, saved, dtype):
    run = saved[dtype]
    rest = parity.leg(run.recipe, layout("dp2+zero"), range(3, 6), resume=run.folder)
    assert rest.losses == run.whole.losses[3:]
    assert rest.grad_norms == run.whole.grad_norms[3:]
    assert all(torch.equal(rest.weights[name], run.whole.weights[name]) for name in run.whole.weights)


@pytest.mark.parametrize("name", [*LOADED_IN, *(pytest.param(name, marks=pytest.mark.slow) for name in LOADED_IN_4)])
def test_resumed_in_another_layout(parity, saved, name):
    run = saved["float32"]
    rest = parity.leg(run.recipe, layout(name), range(3, 6), resume=run.folder)
    assert relative(rest.losses, run.whole.losses[3:]) <= 1e-6
    assert relative(rest.grad_norms, run.whole.grad_norms[3:]) <= 1e-6


def test_resumed_without_the_state_it_is_another_run(parity, saved, tmp_path):
    """Else the test above says nothing about the moments."""
    run = saved["float32"]
    fresh = tmp_path / "fresh"
    parity.leg(replace(run.recipe, lr=0.0, min_lr=0.0), layout("one"), range(1), save=fresh)  # moments of one step
    tensors = contents(fresh)
    assert not torch.equal(*(t["optimizer.state.exp_avg.output_layer.weight"] for t in (tensors, contents(run.folder))))
    rest = parity.leg(run.recipe, layout("one"), range(3, 6), resume=fresh)
    assert relative(rest.losses, run.whole.losses[3:]) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_files_hold_each_parameters_state_by_name_in_its_shape(parity, saved, dtype):
    """Read by torch alone. The same tensors, to the bit, that upstream's unsharded optimizer writes."""
    run = saved[dtype]
    found = contents(run.folder)
    state = {key: tensor for key, tensor in found.items() if key.startswith("optimizer.state.")}
    names = {"fp32_param", *MOMENTS} if dtype == "bfloat16" else MOMENTS
    weights = parity.weights(run.recipe)
    one = run.folder.parent / f"{dtype} of one rank"
    parity.leg(run.recipe, layout("one"), range(0), resume=run.folder, save=one)
    expected = contents(one)
    assert state.keys() == {key for key in expected if key.startswith("optimizer.state.")}
    assert {key.split(".")[2] for key in state} == names
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
    for tensor in state.values():
        assert tensor.dtype == torch.float32
    sizes = sum(tensor.numel() for tensor in state.values())
    assert sizes == len(names) * sum(weight.numel() for weight in weights.values())
    assert all(tensor.dim() > 1 for key, tensor in state.items() if key.endswith("linear_fc2.weight"))


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Each tensor of a distributed checkpoint, whole, with torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    _load_state_dict(found, FileSystemReader(str(folder)), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    flat: dict[str, torch.Tensor] = {}
    _flatten(found, "", flat)
    return flat


def _flatten(value: Any, key: str, into: dict[str, torch.Tensor]) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _flatten(inner, f"{key}.{name}" if key else str(name), into)
    elif isinstance(value, torch.Tensor):
        into[key] = value


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_pieces_cover_each_element_once(ranks):
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    from nxdt_nemo.megatron.optimizer.zero import allocate

    shapes = [(7,), (3, 4), (1,), (5, 2, 2), (2,)]
    seen = [torch.zeros(shape).flatten() for shape in shapes]
    for rank in range(ranks):
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        values = [param.detach().clone() for param in params]
        bucket = allocate(params, SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank))
        assert all(torch.equal(param, value) for param, value in zip(params, values, strict=True))
        for param, piece in bucket.pieces.items():
            place = next(i for i, other in enumerate(params) if other is param)
            seen[place][piece.start : piece.stop] += 1
            assert torch.equal(piece.cut(param.detach()), piece.model)
            piece.model.fill_(-1.0)
            assert bool((param.detach().flatten()[piece.start : piece.stop] == -1).all())  # a view, not a copy
    assert all(bool((count == 1).all()) for count in seen)


def test_backward_adds_to_the_buffer_itself():
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    from nxdt_nemo.megatron.optimizer.zero import allocate

    layer = torch.nn.Linear(4, 3)
    bucket = allocate(list(layer.parameters()), SimpleNamespace(size=lambda: 2, rank=lambda: 0))
    for _ in range(2):
        layer(torch.ones(2, 4)).sum().backward()
    assert bucket.grads[:15].tolist() == [4.0] * 15
    assert layer.weight.grad.data_ptr() == bucket.grads.data_ptr()
