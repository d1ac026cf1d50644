"""distributed_fused_adam and mcore_distributed_optim through NeMo: parity, memory, and checkpoints in other layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nxdt_nemo.testing.parity import Parity, errors, relative
from nxdt_nemo.testing.recipe import Recipe, layout

from .conftest import Run

pytestmark = pytest.mark.ranks

SHARDED = ("distributed_fused_adam", "mcore_distributed_optim")
DP2 = ("trainer.devices=2",)
TP2 = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
PP2 = ("trainer.devices=2", "model.pipeline_model_parallel_size=2")
STEPS = (
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "model.optim.weight_decay=0.0",  # NeMo gives these optimizers other groups for it than fused_adam
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
)


@pytest.fixture(scope="module")
def parity() -> Iterator[Parity]:
    pytest.importorskip("nemo", reason="needs the extra: pip install nxdt-nemo[nemo]")
    with Parity() as session:
        yield session


def rows() -> list[Any]:
    fast = [("gpt", "dp2", name) for name in SHARDED]
    cases = [
        (family, place, name)
        for family in ("gpt", "llama")
        for place in ("dp2", "tp2spdp2", "pp2dp2")
        for name in SHARDED
    ]
    return [case if case in fast else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("family", "place", "name"), rows())
def test_sharded_equals_fused_adam(parity, family, place, name):
    recipe, where = Recipe.of(family, weight_decay=0.0), layout(place)
    plain, _, whole = parity.nemo(recipe, where)
    mine, copies, part = parity.nemo(recipe, where, model__optim__name=name)
    found = errors(mine, plain, copies)
    assert found.worst <= 1e-6, found
    ranks = where.world // (where.tp * where.pp)
    assert part.state_bytes * ranks <= 1.01 * whole.state_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_in_bf16_it_is_within_the_dtypes_own_error(parity, name):
    """megatron_amp_O2. The limit is what another order of sums changes on one rank."""
    recipe, where = Recipe.of("gpt", dtype="bfloat16", weight_decay=0.0), layout("dp2")
    plain, _, _ = parity.nemo(recipe, where)
    mine, copies, _ = parity.nemo(recipe, where, model__optim__name=name)
    found, limit = errors(mine, plain, copies), parity.order_noise(recipe)
    assert found.grad == found.copies == 0.0, found
    assert found.loss <= limit.loss, (found, limit)
    assert found.norm <= 2 * limit.norm, (found, limit)


# what it is resumed with: other sizes, and the optimizer that shards nothing
OTHERS = {
    "one rank, fused_adam": ("trainer.devices=1", "model.optim.name=fused_adam"),
    "one rank": ("trainer.devices=1",),
    "tp2": TP2,
    "pp2": PP2,
}
RESUMED = [("distributed_fused_adam", "one rank, fused_adam")]
ALL = [(name, other) for name in SHARDED for other in OTHERS if (name, other) not in RESUMED]


@pytest.mark.parametrize(("name", "other"), [*RESUMED, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)])
def test_resumed_in_another_layout(train: Callable[..., Run], name: str, other: str) -> None:
    sharded = (*STEPS, *DP2, f"model.optim.name={name}")
    whole = train(*sharded, name="whole")
    assert whole.code == 0, whole.output[-3000:]
    expected = whole.curve()
    half = train(*sharded, "trainer.max_steps=4", name="moved")
    assert half.code == 0, half.output[-3000:]
    rest = train(*sharded, *OTHERS[other], name="moved")
    assert rest.code == 0, rest.output[-3000:]
    found = rest.curve()
    assert found.keys() == expected.keys()
    assert relative([found[step] for step in sorted(found)], [expected[step] for step in sorted(found)]) <= 1e-6
