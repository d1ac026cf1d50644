"""A layer of experts against stock megatron-core at the same layout: routing, capacity, grouped, fixed shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nxdt_nemo.testing.moe_layer import BATCH, EXPERTS, TOKENS, Case, run_all, worst
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pool import RankError
from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.recipe import layout
from nxdt_nemo.testing.reference import STOCK_ENV

pytestmark = pytest.mark.ranks

WORST = {"moe_dropless_bound": "worst"}
SINKHORN = {"moe_router_load_balancing_type": "sinkhorn"}
SIGMOID = {"moe_router_score_function": "sigmoid"}
UNFUSED = {"bias_activation_fusion": False}  # our SwiGLU kernel rounds once in bfloat16, upstream's several times
ROUTING = {
    "top 2": Case(),
    "top 3 of 4": Case({"moe_router_topk": 3}),
    "top 1, softmax over all": Case({"moe_router_topk": 1, "moe_router_pre_softmax": True}),
    "softmax over all, scaled": Case({"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5}),
    "auxiliary and z loss": Case(
        {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.05}
    ),
    "auxiliary loss of sequences": Case({"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}),
    "sinkhorn": Case(SINKHORN),
    "sinkhorn, top 1": Case({**SINKHORN, "moe_router_topk": 1}),
    "sinkhorn, not in training": Case(SINKHORN, training=False),
    "sigmoids": Case(SIGMOID),
    "sigmoids and biases": Case({**SIGMOID, "moe_router_enable_expert_bias": True}),
    "groups of experts": Case({"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_pre_softmax": True}),
    "router in float32": Case({"moe_router_dtype": "fp32", **UNFUSED}, dtype="bfloat16"),
    "router in float64": Case({"moe_router_dtype": "fp64", **UNFUSED}, dtype="bfloat16"),
    "router in bfloat16": Case(UNFUSED, dtype="bfloat16"),
    "probabilities on the input": Case(
        {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_apply_probs_on_input": True}
    ),
    "a shared expert": Case({"moe_shared_expert_intermediate_size": 8}),
    "all-gather": Case({"moe_token_dispatcher_type": "allgather"}),
    "plain activation": Case(UNFUSED),
}


def room(factor: float, policy: str, pad: bool = False, **more: Any) -> Case:
    """A capacity that drops tokens."""
    fields = {"moe_expert_capacity_factor": factor, "moe_token_drop_policy": policy}
    return Case({**fields, "moe_pad_expert_input_to_capacity": pad, **more})


CAPACITY = {
    "the least probable": room(0.75, "probs"),
    "the least probable, padded": room(0.75, "probs", pad=True),
    "the last": room(0.75, "position"),
    "the last, padded": room(0.75, "position", pad=True),
    "half, all-gather": room(0.5, "probs", moe_token_dispatcher_type="allgather"),
    "half, with an auxiliary loss": room(
        0.5, "probs", moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1
    ),
}
CASES = ROUTING | CAPACITY
TOLERANCE = {"float32": 2e-6, "bfloat16": 0.0}
SLOW = ("one", "tp2sp", "tp2spep2", "tp2spep2etp1")
LAYOUTS = ["ep2", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
Pair = Callable[..., list[Any]]


def world(name: str) -> Any:
    """A layout whose data-parallel ranks are those that expert parallelism needs."""
    place = layout(name)
    experts = (place.etp or place.tp) * place.ep
    return replace(place, dp=max(1, experts // place.tp))


@pytest.fixture(scope="module")
def ours(gloo: Gloo) -> Pair:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")

    def run(name: str, cases: dict[str, Case]) -> list[Any]:
        place = world(name)
        return gloo(place.world, run_all, cases, place, "ours", init=ACTIVE, env=ACTIVE_ENV)

    return run


@pytest.fixture(scope="module")
def stock(gloo: Gloo) -> Callable[[str], list[Any]]:
    """All cases of upstream's in a layout, run once."""
    known: dict[str, list[Any]] = {}

    def run(name: str) -> list[Any]:
        if name not in known:
            place = world(name)
            known[name] = gloo(place.world, run_all, CASES, place, "stock", env=STOCK_ENV)
        return known[name]

    return run


def errors(left: list[Any], right: list[Any], names: dict[str, Case]) -> dict[str, tuple[float, str]]:
    """The worst of all ranks, by case, where it is beyond the case's tolerance."""
    found = {name: max(worst(a[name], b[name]) for a, b in zip(left, right, strict=True)) for name in names}
    return {name: error for name, error in found.items() if not error[0] <= TOLERANCE[names[name].dtype]}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layer_is_stocks(ours, stock, name):
    assert errors(ours(name, CASES), stock(name), CASES) == {}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_capacity_drops_tokens(stock, name):
    """Of each rank's 24 tokens twice, no expert has more than 9 (half: 6)."""
    for case, setting in CAPACITY.items():
        rows = 9 if setting.fields["moe_expert_capacity_factor"] == 0.75 else 6
        for rank in stock(name):
            counts = rank[case]["routed"].sum(0)
            assert int(counts.max()) == rows
            assert 20 < int(counts.sum()) <= EXPERTS * rows < 2 * TOKENS * BATCH


def test_another_capacity_would_be_seen(ours, stock):
    cases = {name: case.by(fault="capacity one too large") for name, case in CAPACITY.items()}
    assert errors(ours("ep2", cases), stock("ep2"), CAPACITY).keys() == CAPACITY.keys()


# --- grouped experts, and fixed shapes ----------------------------------------------------------------------------

WAYS: dict[str, Callable[[Case], Case]] = {
    "grouped": lambda case: case.by(moe_grouped_gemm=True),
    "grouped, gradients in main_grad": lambda case: case.by(moe_grouped_gemm=True, gradient_accumulation_fusion=True),
    "grouped, activations recomputed": lambda case: case.by(
        moe_grouped_gemm=True, recompute_granularity="selective", recompute_modules=["moe_act"]
    ),
    "fixed shapes": lambda case: case.by(marks=WORST),
    "grouped, fixed shapes": lambda case: case.by(moe_grouped_gemm=True, marks=WORST),
    "grouped, fixed shapes, activations recomputed": lambda case: case.by(
        marks=WORST, moe_grouped_gemm=True, recompute_granularity="selective", recompute_modules=["moe_act"]
    ),
}
FLOAT32 = {name: case for name, case in CASES.items() if case.dtype == "float32"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_by_other_means_a_layer_is_stocks(ours, stock, name, way):
    cases = {key: WAYS[way](case) for key, case in FLOAT32.items()}
    assert errors(ours(name, cases), stock(name), FLOAT32) == {}


def test_in_bfloat16_they_round_alike(ours, stock):
    """Rows of probability 0 and a batched product may be added up in another order: a unit of bfloat16's 8 bits."""
    half = {name: case for name, case in CASES.items() if case.dtype == "bfloat16"}
    for way in ("grouped", "fixed shapes", "grouped, fixed shapes"):
        found = ours("ep2", {name: WAYS[way](case) for name, case in half.items()})
        for mine, theirs in zip(found, stock("ep2"), strict=True):
            assert all(worst(mine[name], theirs[name])[0] <= 2**-7 for name in half), way


@pytest.mark.parametrize(
    ("way", "fault"),
    [
        ("grouped", "an expert's gradient left out"),
        ("grouped, fixed shapes", "an expert's gradient left out"),
        ("fixed shapes", "rows dropped"),
        ("grouped, fixed shapes", "rows dropped"),
    ],
)
def test_a_mistake_would_be_seen(ours, stock, way, fault):
    cases = {"top 2": ROUTING["top 2"]}
    found = ours("ep2", {"top 2": replace(WAYS[way](cases["top 2"]), fault=fault)})
    assert errors(found, stock("ep2"), cases)["top 2"][0] > 1e-3


EVEN = {"moe_dropless_bound": 1.0}


def test_a_bound_that_holds_drops_nothing(ours, stock):
    """Twice an even share is all tokens: of 24 two of four experts each."""
    cases = {"top 2": ROUTING["top 2"].by(marks={"moe_dropless_bound": 2})}
    assert errors(ours("ep2", cases), stock("ep2"), cases) == {}


def test_a_bound_that_is_exceeded_is_an_error_and_drops_nothing_silently(ours):
    with pytest.raises(RankError) as error:
        ours("one", {"top 2": ROUTING["top 2"].by(marks=EVEN)})
    text = "moe_dropless_bound: 1.0 leaves an expert 12 rows, and "
    assert error.value.kind == "ConfigError" and text in str(error.value)
    assert "use worst or a larger factor" in str(error.value)


def answered_late(batches: list[tuple[int, int]]) -> list[str]:
    """Answers on a lane that gives them when all batches are through: of T tokens, so many go to the first experts."""
    from unittest import mock

    import torch

    from nxdt_nemo.errors import ConfigError
    from nxdt_nemo.runtime import current
    from nxdt_nemo.testing.moe_layer import in_layout, layer_of

    one, waiting = layout("one"), []
    with in_layout(one, "ours"), mock.patch.object(type(current()), "defer", lambda _, *asked: waiting.append(asked)):
        layer = layer_of(Case(marks={"moe_dropless_bound": 1.5}), one, "ours").layer.mlp
        for tokens, first in batches:
            routes = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
            routes[:first, :2] = routes[first:, 2:] = True
            layer.token_dispatcher.preprocess(routes)
    answers = []
    for function, most in waiting:
        try:
            function(most)
            answers.append("fits")
        except ConfigError as error:
            answers.append(error.reason)
    return answers


def test_a_late_answer_is_of_its_own_batchs_rows(active):
    too_many = "1.5 leaves an expert 6 rows, and 8 tokens of one rank were sent to one"
    assert active(answered_late, [(32, 16), (8, 4)]) == ["fits", "fits"]
    assert active(answered_late, [(8, 8), (32, 16)]) == [too_many, "fits"]


@pytest.mark.parametrize("bound", [0.5, "most", True, float("inf"), float("nan")])
def test_what_is_no_bound_is_an_error(ours, bound):
    with pytest.raises(RankError) as error:
        ours("one", {"top 2": ROUTING["top 2"].by(marks={"moe_dropless_bound": bound})})
    assert error.value.kind == "ConfigError" and f"{bound!r} is not a bound" in str(error.value)


def rows_of(factor: float | None, capacity: float | None) -> list[int]:
    from nxdt_nemo.megatron.transformer.moe.token_dispatcher import Bound

    bound = Bound(factor, capacity)
    return [bound.rows(24, 2, 4), bound.rows(23, 2, 8), bound.rows(5, 1, 64), int(bound.may_be_exceeded)]


@pytest.mark.parametrize(
    ("factor", "capacity", "rows"),
    [
        (None, None, [24, 23, 5, 0]),
        (1.0, None, [12, 6, 1, 1]),
        (1.5, None, [18, 9, 1, 1]),
        (100.0, None, [24, 23, 5, 1]),
        (None, 0.5, [6, 3, 1, 0]),
        (9.0, 0.5, [6, 3, 1, 0]),
    ],
)
def test_rows_of_a_bound(active, factor, capacity, rows):
    assert active(rows_of, factor, capacity) == rows


def lanes_choice(ragged: bool, capacity: float | None) -> str:
    """What a layer's dispatcher is on a lane that traces or does not, without the configuration's asking."""
    from unittest import mock

    from nxdt_nemo.runtime import current
    from nxdt_nemo.testing.moe_layer import in_layout, layer_of

    case, one = Case({"moe_expert_capacity_factor": capacity, "moe_token_dispatcher_type": "allgather"}), layout("one")
    with in_layout(one, "ours"), mock.patch.object(type(current()), "ragged", ragged):
        dispatcher = layer_of(case, one, "ours").layer.mlp.token_dispatcher
    return f"{type(dispatcher).__name__} {getattr(dispatcher, 'bound', '')}"


def test_a_lane_that_traces_gets_fixed_shapes(active):
    assert active(lanes_choice, True, None) == "MoEAllGatherTokenDispatcher "
    assert active(lanes_choice, False, None) == "StaticTokenDispatcher Bound(factor=None, capacity=None)"
    assert active(lanes_choice, False, 0.5) == "StaticTokenDispatcher Bound(factor=None, capacity=0.5)"


def traced(case: Case, ragged: bool) -> str:
    """A step with tensors that have shapes and no values, on a lane that traces or not; an error where values count."""
    from unittest import mock

    import torch
    from torch._subclasses import FakeTensorMode

    from nxdt_nemo.runtime import current
    from nxdt_nemo.testing.moe_layer import HIDDEN, in_layout, layer_of

    one = layout("one")
    with in_layout(one, "ours"), mock.patch.object(type(current()), "ragged", ragged):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                layer = layer_of(case, one, "ours").layer.mlp
                x = torch.randn(TOKENS, BATCH, HIDDEN).requires_grad_()
                y, _ = layer(x)
                y.sum().backward()
            assert x.grad is not None and y.shape == x.shape
        except Exception as error:
            return type(error).__name__
    return "traced"


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["top 2", "auxiliary and z loss", "the least probable", "all-gather", "sinkhorn"])
def test_a_step_of_fixed_shapes_can_be_traced(active, name, grouped):
    case = CASES[name].by(moe_grouped_gemm=grouped)
    assert active(traced, case, False) == "traced"
    assert active(traced, case, True) in ("DynamicOutputShapeException", "DataDependentOutputException")


# --- parts --------------------------------------------------------------------------------------------------------


def products(sizes: list[int]) -> list[float]:
    """Errors of gmm and of our product against one plain product an expert: values, and both gradients."""
    import torch

    from nxdt_nemo.megatron.transformer.moe.experts import _Product
    from nxdt_nemo.megatron.transformer.moe.grouped_gemm import gmm

    a, dy = torch.randn(sum(sizes), 5, dtype=torch.float64), torch.randn(sum(sizes), 7, dtype=torch.float64)
    b = torch.randn(len(sizes), 5, 7, dtype=torch.float64)
    main = torch.ones(5, len(sizes) * 7, dtype=torch.float64)

    def grads(function: Any) -> list[Any]:
        x, w = a.clone().requires_grad_(), b.clone().requires_grad_()
        y = function(x, w)
        y.backward(dy)
        return [y.detach(), x.grad, w.grad]

    def fused(x: Any, w: Any) -> Any:
        w.main_grad = main.view_as(w)
        return _Product.apply(x, w, tuple(sizes), True)

    plain = grads(lambda x, w: torch.cat([rows @ one for rows, one in zip(x.split(sizes), w, strict=True)]))
    ways = [
        grads(lambda x, w: gmm(x, w, torch.tensor(sizes))),
        grads(lambda x, w: gmm(x, w.transpose(1, 2), torch.tensor(sizes), trans_b=True)),
        grads(lambda x, w: _Product.apply(x, w, tuple(sizes), False)),
        [*grads(fused)[:2], main.view_as(b) - 1],
    ]
    return [float((x - y).abs().max()) if x.numel() else 0.0 for way in ways for x, y in zip(way, plain, strict=True)]


@pytest.mark.parametrize("sizes", [[3, 0, 4], [2, 2, 2], [5], [0, 0]])
def test_products_are_those_of_each_expert(active, sizes):
    assert max(active(products, sizes)) < 1e-14


def sinkhorns(scale: float, steps: int) -> tuple[bool, bool]:
    """Whether our iteration of fixed length is upstream's to the bit, and picks the same experts."""
    import torch
    from megatron.core.transformer.moe.moe_utils import sinkhorn as active_sinkhorn

    from nxdt_nemo.megatron.transformer.moe.moe_utils import sinkhorn_steps

    cost = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * scale
    theirs, mine = active_sinkhorn(cost), sinkhorn_steps(cost, steps=steps)
    return torch.equal(theirs, mine), torch.equal(theirs.topk(2)[1], mine.topk(2)[1])


@pytest.mark.parametrize("scale", [0.0, 0.02, 0.5, 2.0])
def test_sinkhorn_of_a_fixed_length_is_upstreams_to_the_bit(active, scale):
    assert active(sinkhorns, scale, 30) == (True, True)


def test_too_short_a_sinkhorn_would_be_seen(active):
    assert active(sinkhorns, 2.0, 1)[0] is False
