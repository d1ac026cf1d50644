"""distributed_fused_adam and mcore_distributed_optim through NeMo: parity, memory, and checkpoints in other layouts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.parity import relative
from nxdt_nemo.testing.recipe import Recipe, layout

from .conftest import O2, Run

pytestmark = pytest.mark.ranks

DIES = Path(__file__).with_name("dies_at.py")
SHARDED = ("distributed_fused_adam", "mcore_distributed_optim")
DP2 = ("trainer.devices=2",)
TP2 = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
PP2 = ("trainer.devices=2", "model.pipeline_model_parallel_size=2")
STEPS = (
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "model.optim.weight_decay=0.0",  # NeMo gives these optimizers other groups for it than fused_adam
    "model.bias=True",  # else all parameters of fused_adam are in one group, and those of megatron-core's in two
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
)


def rows() -> list[Any]:
    return [
        (family, place, name)
        for family in ("gpt", "llama")
        for place in ("dp2", "tp2spdp2", "pp2dp2")
        for name in SHARDED
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "place", "name"), rows())
def test_sharded_equals_fused_adam(parity, family, place, name):
    recipe, where = Recipe.of(family, weight_decay=0.0), layout(place)
    row = parity.nemo_zero_against_unsharded(recipe, where, name, 1e-6)
    assert row.good, row
    whole = parity.nemo_state_bytes(recipe, where)
    mine = parity.nemo_state_bytes(recipe, where, model__optim__name=name)
    assert all(part * where.dp <= 1.01 * of for part, of in zip(mine, whole, strict=True)), (mine, whole)


@pytest.mark.slow
def test_overlapped_collectives_change_nothing(parity):
    recipe = Recipe.of("gpt", weight_decay=0.0)
    keys = {"model__optim__overlap_grad_sync": True, "model__optim__overlap_param_sync": True}
    row = parity.nemo_zero_against_unsharded(recipe, layout("dp2"), "mcore_distributed_optim", 1e-6, **keys)
    assert row.good, row


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_in_bf16_it_is_within_the_dtypes_own_error(parity, name):
    """megatron_amp_O2. The limit is twice what another order of sums changes on one rank."""
    recipe = Recipe.of("gpt", dtype="bfloat16", weight_decay=0.0)
    row = parity.nemo_zero_against_unsharded(recipe, layout("dp2"), name, parity.order_noise(recipe).times(2))
    assert row.good, row
    assert row.errors.grad == row.errors.copies == 0.0, row


def by_hand() -> dict[str, Any]:
    """distributed_fused_adam alone, bf16: weights that come later, and groups that others have saved."""
    import torch
    from megatron.core import parallel_state

    from nxdt_nemo.nemo.core.optim.distributed_adam import MegatronDistributedFusedAdam

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    layer = torch.nn.Linear(5, 3).bfloat16()
    decayed, spared = {"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}
    optimizer = MegatronDistributedFusedAdam([decayed, spared], lr=1e-2, weight_decay=0.1)
    optimizer.init_params()

    def step(value: float, rate: float) -> list[float]:
        optimizer.zero_grad()
        layer(torch.full((2, 5), value).bfloat16()).sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        return sorted({float(x) for param in layer.parameters() for x in param.flatten()})

    def groups() -> list[tuple[float, float, int]]:
        return [(group["lr"], group["weight_decay"], group["step"]) for group in optimizer.param_groups]

    step(1.0, 1e-2)
    found: dict[str, Any] = {"places": sorted(optimizer.state_dict())}
    for reload in (True, False):
        with torch.no_grad():
            for param in layer.parameters():
                param.fill_(0.25 if reload else 0.5)
        if reload:
            optimizer.reload_model_params()
        found[f"reloaded {reload}"] = step(1.0, 0.0)
    empty = {"optimizer": {"param_groups": [{"params": []}, {"params": []}]}}
    saved = [{"lr": 0.5, "weight_decay": 0.2}, {"lr": 0.5, "weight_decay": 0.0}]
    optimizer.load_state_dict({**empty, "param_groups": saved, "state": {"step": torch.tensor(7)}})
    found["Apex's"] = groups()
    saved = [{"lr": 0.4, "weight_decay": 0.3, "wd_mult": number, "step": 9} for number in (1.0, 0.0)]
    optimizer.load_state_dict({"optimizer": {"param_groups": saved}})
    found["megatron-core's"] = groups()
    return found


def test_what_comes_from_elsewhere(gloo):
    """Places as upstream's class has them: MainParamsOptimizerWrapper's in bf16, which NeMo looks into."""
    pytest.importorskip("nemo", reason="needs the extra: pip install nxdt-nemo[nemo]")
    for found in gloo(2, by_hand, init=ACTIVE, env=ACTIVE_ENV):
        assert found == {
            "places": ["optimizer"],
            "reloaded True": [0.25],
            "reloaded False": [0.25],  # the control: main parameters win
            "Apex's": [(0.5, 0.2, 7), (0.5, 0.0, 7)],
            "megatron-core's": [(0.4, 0.2, 9), (0.4, 0.0, 9)],  # it decays other parameters
        }


def in_buckets(megabytes: float) -> tuple[int, list[list[float]]]:
    """How many buckets distributed_fused_adam makes, and the parameters after two steps."""
    import torch
    from megatron.core import parallel_state

    from nxdt_nemo.nemo.core.optim.distributed_adam import MegatronDistributedFusedAdam

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    torch.manual_seed(3)
    layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    optimizer = MegatronDistributedFusedAdam(layers.parameters(), lr=1e-2, bucket_cap_mb=megabytes)
    optimizer.init_params()
    torch.manual_seed(4 + torch.distributed.get_rank())
    for _ in range(2):
        optimizer.zero_grad()
        layers(torch.randn(2, 5)).square().sum().backward()
        optimizer.step()
    return len(optimizer.buckets), [param.flatten().tolist() for param in layers.parameters()]


def test_the_size_of_a_bucket_changes_nothing_but_their_number(gloo):
    """bucket_cap_mb: room for 40 float32 gradients, of 35, 7, 21 and 3."""
    pytest.importorskip("nemo", reason="needs the extra: pip install nxdt-nemo[nemo]")
    one, several = (gloo(2, in_buckets, size, init=ACTIVE, env=ACTIVE_ENV)[0] for size in (100, 40 * 4 / 2**20))
    assert (one[0], several[0]) == (1, 2)
    assert one[1] == several[1]


# what it is resumed with: other sizes, the other sharded optimizer, and the ones that shard nothing
OTHERS = {
    "one rank with fused_adam": ("trainer.devices=1", "model.optim.name=fused_adam"),
    "one rank with adamw": ("trainer.devices=1", "model.optim.name=adamw"),
    "one rank": ("trainer.devices=1",),
    "tp2": TP2,
    "pp2": PP2,
    **{f"dp2 with {name}": (*DP2, f"model.optim.name={name}") for name in SHARDED},
}
SIZES = ("one rank", "tp2", "pp2")
RESUMED = [
    ("distributed_fused_adam", ("one rank with fused_adam",)),
    ("distributed_fused_adam", (*SIZES, "one rank with adamw", "dp2 with mcore_distributed_optim")),
    ("mcore_distributed_optim", (*SIZES, "one rank with fused_adam", "dp2 with distributed_fused_adam")),
    ("fused_adam", ("dp2 with distributed_fused_adam", "dp2 with mcore_distributed_optim")),
    ("adamw", ("dp2 with distributed_fused_adam", "dp2 with mcore_distributed_optim")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "others"), RESUMED)
def test_killed_and_resumed_in_another_layout(
    train: Callable[..., Run], tmp_path: Path, name: str, others: tuple[str, ...]
) -> None:
    """Saved on two data-parallel ranks after four steps. The first resumed step's learning rate is the saved one."""
    saved = (*STEPS, *DP2, f"model.optim.name={name}")
    whole = train(*saved, name="whole")
    assert whole.code == 0, whole.output[-3000:]
    killed = train(*saved, name="killed", script=DIES, environment={"DIE_AT": "6"})
    assert killed.code != 0
    expected, found = whole.curve(), {}
    for other in others:
        shutil.copytree(killed.folder, tmp_path / other)
        rest = train(*saved, *OTHERS[other], name=other)
        assert rest.code == 0, f"{other}: {rest.output[-3000:]}"
        curve = rest.curve()
        assert curve.keys() == expected.keys(), other
        found[other] = relative([curve[step] for step in range(4, 8)], [expected[step] for step in range(4, 8)])
    assert max(found.values()) <= 1e-6, found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "another"), [*pairwise((*SHARDED, "fused_adam", SHARDED[0]))])
def test_main_parameters_are_resumed(train: Callable[..., Run], tmp_path: Path, name: str, another: str) -> None:
    """megatron_amp_O2, on two ranks. The same optimizer goes on to the bit; another one clips by another last digit."""
    saved = (*STEPS, *DP2, *O2, f"model.optim.name={name}")
    whole = train(*saved, name="whole")
    assert whole.code == 0, whole.output[-3000:]
    killed = train(*saved, name="killed", script=DIES, environment={"DIE_AT": "6"})
    assert killed.code != 0
    expected, found = whole.curve(), {}
    for other in (name, another):
        shutil.copytree(killed.folder, tmp_path / other)
        rest = train(*saved, f"model.optim.name={other}", name=other)
        assert rest.code == 0, f"{other}: {rest.output[-3000:]}"
        curve = rest.curve()
        found[other] = [abs(curve[step] - expected[step]) / expected[step] for step in range(4, 8)]
    assert found[name] == [0.0] * 4
    assert all(errors[0] == 0.0 and max(errors) <= 1e-4 for errors in found.values()), found


MOE = (
    *DP2,
    *O2,
    "model.optim.name=mcore_distributed_optim",
    "model.bias=False",
    "+model.num_moe_experts=4",
    "+model.moe_router_topk=2",
    "+model.moe_router_dtype=fp32",
    "+model.moe_token_dispatcher_type=alltoall",
    "+model.moe_grouped_gemm=False",
)


@pytest.mark.slow
@pytest.mark.parametrize(("home", "other"), [(2, 1), (1, 2)])
def test_resumed_at_another_expert_parallel_size(
    train: Callable[..., Run], tmp_path: Path, home: int, other: int
) -> None:
    """Experts' optimizer and parameter groups come or go; a rate that stayed behind would show in the losses."""
    saved = (*STEPS, *MOE, f"+model.expert_model_parallel_size={home}")
    whole = train(*saved, name="whole")
    assert whole.code == 0, whole.output[-3000:]
    killed = train(*saved, name="killed", script=DIES, environment={"DIE_AT": "6"})
    assert killed.code != 0
    rest = train(*STEPS, *MOE, f"+model.expert_model_parallel_size={other}", name="killed")
    assert rest.code == 0, rest.output[-3000:]
    expected, found = whole.curve(), rest.curve()
    errors = [abs(found[step] - expected[step]) / expected[step] for step in range(4, 8)]
    assert errors[0] <= 1e-6 and max(errors) <= 1e-4, errors


@pytest.mark.slow
def test_another_number_of_groups_is_refused(train: Callable[..., Run]) -> None:
    """A resumed scheduler would leave the rate of the group that it does not know as it is."""
    saved = (*STEPS, *DP2, "model.bias=False")
    killed = train(*saved, "model.optim.name=fused_adam", script=DIES, environment={"DIE_AT": "5"})
    assert killed.code != 0
    rest = train(*saved, "model.optim.name=mcore_distributed_optim")
    assert rest.code != 0
    line = "parameter groups: 1 in the checkpoint, 2 in this optimizer; resume with the optimizer that saved it"
    assert line in rest.output
