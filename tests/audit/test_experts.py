"""The audit of a mixture of experts: whose tokens go where, at what cost; ranks of all kinds that run one program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

pytestmark = pytest.mark.ranks

ONE_STAGE = ["model.pipeline_model_parallel_size=1"]
TP1 = [*ONE_STAGE, "model.tensor_model_parallel_size=1", "model.sequence_parallel=False"]
TP2 = [*ONE_STAGE, "model.tensor_model_parallel_size=2"]
MIXTRAL = ["++model.num_moe_experts=4", "++model.moe_router_topk=2", "++model.moe_aux_loss_coeff=0.02"]
EP2, EP4 = ("++model.expert_model_parallel_size=2", "++model.expert_model_parallel_size=4")
ONE = ["model.num_layers=1"]
FULL = [
    "model.activations_checkpoint_granularity=full",
    "++model.activations_checkpoint_method=uniform",
    "++model.activations_checkpoint_num_layers=1",
]
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
PADDING = 0.001  # parameters in buckets of the sharded optimizer, of so small a model


def agree(found: dict[str, Any]) -> None:
    """Ranks of a stage run one program, all on the device."""
    assert found["mismatch"] is None and found["fallbacks"] == {} and found["host_transfers"] == {}
    stages = {rank["stage"][0] for rank in found["ranks"]}
    assert len({(rank["stage"][0], rank["program"]) for rank in found["ranks"]}) == len(stages)


def groups(rank: dict[str, Any], kind: str, dtype: str) -> set[tuple[int, ...]]:
    """Whom a rank has collectives of this kind with."""
    return {tuple(row["ranks"]) for row in rank["transfers"] if (row["kind"], row["dtype"]) == (kind, dtype)}


def parameters(ep: int, tp: int, layers: int) -> int:
    """Of a rank: TINY has hidden size 64, 8 heads of 8, 2 KV heads, 96 in an expert and 512 rows of vocabulary."""
    attention = (2 * 64 + 2 * 2 * 8) // tp * 64
    experts = 4 // ep * 3 * 96 // tp * 64
    return layers * (attention + experts + (4 + 2) * 64) + 64 + 2 * 512 // tp * 64


@pytest.mark.parametrize(
    ("job", "ranks", "world", "ep", "tp", "layers"),
    [
        ([*TP2, EP2, "model.num_layers=3", "model.global_batch_size=2"], [0, 2], 4, 2, 2, 3),
        pytest.param([*TP2, EP2, *ONE, "model.global_batch_size=8"], range(8), 8, 2, 2, 1, marks=pytest.mark.slow),
        pytest.param([*TP1, EP2, *ONE, "model.global_batch_size=2"], range(2), 2, 2, 1, 1, marks=pytest.mark.slow),
        pytest.param([*TP1, EP4, *ONE, "model.global_batch_size=16"], range(16), 16, 4, 1, 1, marks=pytest.mark.slow),
    ],
    ids=["ep2tp2", "ep2tp2dp4", "ep2", "ep4dp16"],
)
def test_tokens_go_to_the_ranks_of_their_experts(
    audited: Callable[..., dict[str, Any]],
    job: list[str],
    ranks: Sequence[int],
    world: int,
    ep: int,
    tp: int,
    layers: int,
) -> None:
    """Tokens in fixed shapes, of which the bytes, the FLOPs and the parameters are those of a count."""
    found = audited([*MIXTRAL, *job], world, ranks=ranks)
    agree(found)
    assert found["compared"] == math.comb(len(ranks), 2)
    for rank in found["ranks"]:
        first = rank["rank"] // (tp * ep) * tp * ep + rank["rank"] % tp
        assert groups(rank, "all-to-all", "bf16") == {tuple(range(first, first + tp * ep, tp))}
        copies = tuple(range(rank["rank"] % (tp * ep), world, tp * ep))
        assert len(copies) == 1 or copies in groups(rank, "reduce-scatter", "f32")
        assert rank["parameters"] == parameters(ep, tp, layers)
        assert rank["flops"] == pytest.approx(rank["analytic"]["hardware"], rel=1e-9)
        assert rank["sent_bytes"] == pytest.approx(rank["expected_bytes"], rel=PADDING)
        assert rank["least_bytes"] < rank["expected_bytes"]


SPECIAL = {
    "worst": ["++model.mcore_customization_config.moe_dropless_bound=worst"],
    "factor": ["++model.mcore_customization_config.moe_dropless_bound=1.5"],
    "capacity": ["++model.moe_expert_capacity_factor=1.0"],
    "capacity again": ["++model.moe_expert_capacity_factor=1.5", *FULL],
    "again": FULL,
    "grouped": ["++model.moe_grouped_gemm=True", *FULL],
    "no loss": ["model.moe_aux_loss_coeff=0"],
    "mixed": ["++model.mcore_customization_config.token_shuffle_group_size=2"],
    "shared": ["++model.moe_shared_expert_intermediate_size=48", *FULL],
}
OTHER_BYTES = ("factor", "capacity", "capacity again", "mixed", "shared")  # of which communication.py knows nothing


@pytest.mark.slow
@pytest.mark.parametrize("special", SPECIAL)
def test_room_for_tokens_is_counted(audited: Callable[..., dict[str, Any]], special: str) -> None:
    """EP 2 x TP 2: rows of no token, dropped tokens, what runs again."""
    found = audited([*TP2, *MIXTRAL, EP2, *ONE, "model.global_batch_size=4", *SPECIAL[special]], 4, ranks=range(4))
    agree(found)
    for rank in found["ranks"]:
        assert rank["flops"] == pytest.approx(rank["analytic"]["hardware"], rel=1e-9)
        if special in OTHER_BYTES:
            assert rank["least_bytes"] is rank["expected_bytes"] is None
        else:
            assert rank["sent_bytes"] == pytest.approx(rank["expected_bytes"], rel=PADDING)


@pytest.mark.slow
def test_a_capacity_of_all_tokens_costs_what_worst_does(audited: Callable[..., dict[str, Any]]) -> None:
    """Of 4 experts, 2 a token: a factor of 2 leaves room for all, of 1 for half of the rows. Probabilities are float32,
    as a run's start makes them where the configuration does not say."""
    worst, room, half = (
        audited([*TP2, *MIXTRAL, EP2, *ONE, "model.global_batch_size=2", *special], 4, ranks=[0])["ranks"][0]
        for special in ([], ["++model.moe_expert_capacity_factor=2.0"], SPECIAL["capacity"])
    )
    assert worst["flops"] == room["flops"] and worst["sent_bytes"] == room["sent_bytes"]
    mlp = 3 * 2 * 64 * 64 * 96 // 2
    assert worst["flops"] - half["flops"] == 3 * 2 * mlp and worst["analytic"]["model"] == half["analytic"]["model"]
    assert groups(worst, "all-to-all", "f32") == {(0, 2)}


@pytest.mark.slow
def test_lines_through_small_steps_are_the_whole_step_of_experts(audited: Callable[..., dict[str, Any]]) -> None:
    job = [*TP2, *MIXTRAL, EP2, "model.num_layers=4", "model.global_batch_size=10"]
    [small], [whole] = (audited(job, 4, ranks=[0], whole=all_of_it)["ranks"] for all_of_it in (False, True))
    for name in ("flops", "parameters", "sent_bytes", "state_bytes"):
        assert small[name] == pytest.approx(whole[name], rel=1e-3), name
    assert small["peak_bytes"] == pytest.approx(whole["peak_bytes"], rel=0.01)


@pytest.mark.slow
def test_a_rank_that_was_started_with_other_experts_parts(audited: Callable[..., dict[str, Any]]) -> None:
    job = [*TP1, *MIXTRAL, EP2, *ONE, "model.global_batch_size=4"]
    found = audited(job, 4, ranks=range(4), on={1: [EP4]})
    assert "ranks 0 and 1" in found["mismatch"] and "all-to-all" in found["mismatch"]
    assert len({rank["program"] for rank in found["ranks"]}) == 2


PP2 = ["model.pipeline_model_parallel_size=2", "model.num_layers=2", "model.global_batch_size=4"]
INVARIANT = {
    "cp2tp2": ([*TP2, *ONE, "model.context_parallel_size=2", "model.global_batch_size=2"], 8),
    "cp2tp2ep2": ([*TP2, *ONE, *MIXTRAL, EP2, "model.context_parallel_size=2", "model.global_batch_size=2"], 8),
    "cp2pp2": ([*TP1, *PP2, "model.context_parallel_size=2"], 8),
    "tp2, dropout": ([*TP2, *ONE, *DROPOUT, "model.global_batch_size=4"], 4),
    "pp2tp2, dropout": ([*TP2, *PP2, *DROPOUT], 8),
    "pp2tp2ep2": ([*TP2, *PP2, *MIXTRAL, EP2], 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INVARIANT)
def test_ranks_of_a_stage_run_one_program(audited: Callable[..., dict[str, Any]], name: str) -> None:
    """Nothing of a rank's number is in the graph: where its part of a sequence begins, what seeds its dropout."""
    job, world = INVARIANT[name]
    agree(audited(job, world, ranks=range(world)))
