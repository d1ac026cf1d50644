"""A mixture of experts in a configuration: the line for each mistake, and silence otherwise."""

from __future__ import annotations

import pytest

from nxdt_nemo.config import check

MOE = ["+model.num_moe_experts=4", "++model.bias=False"]
TYPE = "model.moe_router_load_balancing_type"
FACTOR = "model.moe_expert_capacity_factor"
OWN = "model.mcore_customization_config"

WRONG = [  # overrides, the line
    ([f"++{TYPE}=switch"], f"{TYPE}=switch is not known; use aux_loss, seq_aux_loss, sinkhorn or none"),
    (
        ["++model.moe_token_dispatcher_type=alltoall_seq"],
        "model.moe_token_dispatcher_type=alltoall_seq is not known; use alltoall or allgather",
    ),
    (
        ["++model.moe_token_drop_policy=random"],
        "model.moe_token_drop_policy=random is not known; use probs or position",
    ),
    (["++model.moe_router_dtype=bf16"], "model.moe_router_dtype=bf16 is not known; use fp32 or fp64"),
    (
        ["++model.moe_router_score_function=relu"],
        "model.moe_router_score_function=relu is not known; use softmax or sigmoid",
    ),
    (["++model.moe_router_topk=5"], "model.moe_router_topk=5 of model.num_moe_experts=4; use 1 to 4"),
    (
        ["++model.moe_router_topk=1"],
        "model.moe_router_topk=1: a softmax over one expert is always 1, and the router learns nothing; "
        "use model.moe_router_pre_softmax=True",
    ),
    (
        ["++model.bias=True"],
        "model.bias=True with model.num_moe_experts=4: experts have no biases; use model.bias=False",
    ),
    (
        ["++model.moe_router_enable_expert_bias=True"],
        "model.moe_router_enable_expert_bias=True is added to sigmoids only; "
        "use model.moe_router_score_function=sigmoid",
    ),
    (
        [f"++{TYPE}=sinkhorn", "++model.moe_aux_loss_coeff=0.1"],
        f"{TYPE}=sinkhorn balances without a loss, but model.moe_aux_loss_coeff=0.1; use model.moe_aux_loss_coeff=0",
    ),
    (
        [f"++{TYPE}=sinkhorn", f"++{FACTOR}=1.0"],
        f"{TYPE}=sinkhorn drops no token, but {FACTOR}=1.0; use {FACTOR}=null",
    ),
    (
        ["++model.moe_pad_expert_input_to_capacity=True"],
        f"model.moe_pad_expert_input_to_capacity=True without {FACTOR}; "
        f"set {FACTOR}, or model.moe_pad_expert_input_to_capacity=False",
    ),
    ([f"++{FACTOR}=much"], f"{FACTOR}=much is not a factor; use a positive number, or null to drop nothing"),
    (
        [f"++{FACTOR}=3"],
        f"{FACTOR}=3 leaves each expert room for more tokens than there are (model.moe_router_topk=2, "
        "model.num_moe_experts=4); use at most 2, which drops nothing",
    ),
    (
        [f"++{OWN}.moe_dropless_bound=0.5"],
        f"{OWN}.moe_dropless_bound=0.5 is not a bound; use worst, a factor of at least 1, or null",
    ),
    (
        [f"++{OWN}.token_shuffle_group_size=0"],
        f"{OWN}.token_shuffle_group_size=0 is not a number of ranks; use 1 for none",
    ),
    (
        [f"++{OWN}.token_shuffle_group_size=2", f"++{TYPE}=seq_aux_loss"],
        f"{OWN}.token_shuffle_group_size=2 mixes sequences, and {TYPE}=seq_aux_loss balances each; use 1",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), WRONG)
def test_a_mistake_is_one_line(errors, overrides, line):
    assert errors(*MOE, *overrides) == [f"tiny_gpt.yaml: {line}"]


def test_a_shuffle_divides_the_data_parallel_ranks(errors):
    overrides = [*MOE, f"++{OWN}.token_shuffle_group_size=3", "++model.tensor_model_parallel_size=1"]
    assert errors(*overrides, world_size=3) == [] or "global_batch_size" in errors(*overrides, world_size=3)[0]
    line = f"tiny_gpt.yaml: {OWN}.token_shuffle_group_size=3 does not divide the 2 data-parallel ranks; use a divisor"
    assert line in errors(*overrides, world_size=2)


RIGHT = [
    [],
    [f"++{TYPE}=sinkhorn", "++model.moe_router_topk=1"],
    ["++model.moe_router_topk=1", "++model.moe_router_pre_softmax=True"],
    ["++model.moe_router_enable_expert_bias=True", "++model.moe_router_score_function=sigmoid"],
    [f"++{FACTOR}=2.0", "++model.moe_pad_expert_input_to_capacity=True"],
    [f"++{FACTOR}=-1"],
    ["++model.moe_token_dispatcher_type=flex"],  # changed
    [f"++{OWN}.moe_dropless_bound=worst"],
    [f"++{OWN}.moe_dropless_bound=1.25"],
    ["++model.moe_grouped_gemm=True"],
]


@pytest.mark.parametrize("overrides", RIGHT)
def test_what_megatron_core_takes_is_let_through(gpt, overrides):
    assert [str(error) for error in check(gpt(*MOE, *overrides)).errors] == []


def test_without_experts_nothing_is_said(gpt):
    assert [str(error) for error in check(gpt(f"++{TYPE}=switch", f"++{FACTOR}=3")).errors] == []


DTYPE = "model.moe_router_dtype"


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ([*MOE, "trainer.precision=bf16"], True),
        ([*MOE, "trainer.precision=32"], False),
        ([*MOE, "trainer.precision=bf16", f"++{DTYPE}=null"], False),
        ([*MOE, "trainer.precision=bf16", f"++{DTYPE}=fp64"], False),
        (["trainer.precision=bf16"], False),
    ],
)
def test_a_router_in_bf16_has_to_be_asked_for(gpt, overrides, changed):
    found = [(change.old, change.new) for change in check(gpt(*overrides)).changes if change.key == DTYPE]
    assert found == ([("null (default)", "fp32")] if changed else [])
