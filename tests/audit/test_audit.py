"""The audit of a job: its figures against arithmetic, small steps against whole ones, ranks that part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.config.instances import GIB, instance
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.traced import TRACED_ENV

pytestmark = pytest.mark.ranks

TINY = [
    "model=llama3_8b",
    "target=trn2",
    "model.encoder_seq_length=64",
    "model.max_position_embeddings=64",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=8",
    "model.num_query_groups=2",
    "model.num_layers=6",
    "model.micro_batch_size=1",
    "neuron.vocab_size=512",
    "model.make_vocab_size_divisible_by=8",
]
TP4 = ["model.tensor_model_parallel_size=4", "model.pipeline_model_parallel_size=1", "model.global_batch_size=8"]
PP2 = ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2", "model.global_batch_size=12"]


@pytest.fixture(scope="module")
def audited(with_torch_xla: None) -> Iterator[Callable[..., dict[str, Any]]]:
    """audited(overrides, world, **more): the JSON, from a process on the xla lane."""
    with RankPool(1, env=TRACED_ENV, init="nxdt_nemo:activate", group=False, timeout=600) as pool:
        yield lambda *args, **more: pool.run(_audited, args, more)[0]


def _audited(args: tuple[list[str], int], more: dict[str, Any]) -> dict[str, Any]:
    from nxdt_nemo.audit.summary import audit
    from nxdt_nemo.config.validate import read

    overrides, world = args
    elsewhere = {
        rank: read(Path("train.yaml"), [*TINY, *overrides, *said]) for rank, said in more.pop("on", {}).items()
    }
    config = read(Path("train.yaml"), [*TINY, *overrides])
    chip = instance("trn2.48xlarge", place="--target")
    found: dict[str, Any] = audit(config, world, target=chip, elsewhere=elsewhere, **more).as_json()
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


SMALL = ["model.num_layers=2", "model.global_batch_size=4"]  # 2 micro-batches: nothing is left out


def test_copies_of_kv_heads_sequence_parallelism_and_sharded_optimizer(audited: Callable[..., dict[str, Any]]) -> None:
    """TP 4 of 2 KV heads x DP 2."""
    found = audited([*TP4, *SMALL], 8, ranks=[0])
    [rank] = found["ranks"]
    assert found["lowered_layers"] == [2] and found["lowered_micro_batches"] == [2]
    assert found["graphs"] == 2  # the first step's, and that of the second and the third
    assert found["flops"] == pytest.approx(rank["analytic"]["hardware"], rel=1e-9)
    assert rank["sent_bytes"] / rank["least_bytes"] == pytest.approx(1, abs=0.02)
    assert found["host_transfers"] == {} and found["fallbacks"] == {} and found["mismatch"] is None
    groups = {tuple(row["ranks"]) for row in found["collectives"]}
    assert groups == {(0, 1), (0, 1, 2, 3), (0, 4), tuple(range(8))}
    assert 0 < found["mfu_bound"] < 1 and 0 < found["peak_bytes"] < found["hbm_bytes"]


def test_a_rank_that_was_started_otherwise_parts_and_the_others_run_one_program(
    audited: Callable[..., dict[str, Any]],
) -> None:
    one = ["model.num_layers=1", "model.global_batch_size=2", "+neuron.lnc=1"]
    found = audited([*TP4, *one], 8, ranks=[0, 1, 7], on={1: ["model.sequence_parallel=False"]})
    first, otherwise, last = (rank["program"] for rank in found["ranks"])
    assert first == last != otherwise
    assert "ranks 0 and 1" in found["mismatch"] and "all-reduce" in found["mismatch"]
    core = instance("trn2.48xlarge").core(1)
    assert found["hbm_bytes"] == core.hbm == 12 * GIB
    assert found["ranks"][0]["bounds"]["compute"] == pytest.approx(found["flops"] / core.flops["bfloat16"], rel=1e-9)


LONG = [*TP4, *SMALL, "model.encoder_seq_length=2048", "model.max_position_embeddings=2048", "model.num_layers=1"]


@pytest.mark.slow
@pytest.mark.parametrize("special", [[], ["++model.window_size=[511,0]"], ["model.attention_dropout=0.1"]])
def test_long_sequences_have_the_formulas_flops(audited: Callable[..., dict[str, Any]], special: list[str]) -> None:
    """Causal blocks, blocks with a window, and scores that dropout makes whole."""
    found = audited([*LONG, *special], 4, ranks=[0])
    assert found["flops"] == pytest.approx(found["ranks"][0]["analytic"]["hardware"], rel=1e-9)


@pytest.mark.slow
def test_what_has_no_formula_has_no_mfu(audited: Callable[..., dict[str, Any]]) -> None:
    found = audited([*TP4, *SMALL, "++model.num_moe_experts=4", "++model.moe_router_topk=2"], 4, ranks=[0])
    assert found["mfu_bound"] is None and found["ranks"][0]["bounds"]["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world"), [(TP4, 8), (PP2, 8)])
def test_lines_through_small_steps_are_the_whole_step(
    audited: Callable[..., dict[str, Any]], layout: list[str], world: int
) -> None:
    small, whole = audited(layout, world), audited(layout, world, whole=True)
    for one, all_of_it in zip(small["ranks"], whole["ranks"], strict=True):
        for name in ("flops", "parameters", "sent_bytes", "state_bytes"):
            assert one[name] == pytest.approx(all_of_it[name], rel=1e-3), name
        assert one["peak_bytes"] == pytest.approx(all_of_it["peak_bytes"], rel=0.1)
    assert small["mismatch"] is None and whole["mismatch"] is None


@pytest.mark.slow
def test_every_rank_of_a_pipelines_world(audited: Callable[..., dict[str, Any]]) -> None:
    found = audited(PP2, 8, ranks=[*range(8)])
    assert found["mismatch"] is None
    programs = {rank["rank"]: rank["program"] for rank in found["ranks"]}
    assert {rank["stage"][0] for rank in found["ranks"]} == {0, 1}
    for stage in (range(4), range(4, 8)):
        assert len({programs[rank] for rank in stage}) == 1


@pytest.mark.slow
def test_a_pipeline_stage_with_another_batch_stands_still(audited: Callable[..., dict[str, Any]]) -> None:
    found = audited(PP2, 8, ranks=[0, 4], on={4: ["model.encoder_seq_length=32", "model.max_position_embeddings=32"]})
    assert "ranks 0 and 4" in found["mismatch"]
