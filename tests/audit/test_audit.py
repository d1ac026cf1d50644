"""The audit of a job: its figures against arithmetic, small steps against whole ones, ranks that part."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nxdt_nemo.config.instances import GIB, instance
from nxdt_nemo.testing.audited import audited as audited_here
from nxdt_nemo.testing.pool import RankError, RankPool

pytestmark = pytest.mark.ranks

TP4 = ["model.tensor_model_parallel_size=4", "model.pipeline_model_parallel_size=1", "model.global_batch_size=8"]
PP2 = ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2", "model.global_batch_size=12"]


def audited_while(name: str, ranks: list[int], *arguments: Any) -> dict[str, Any]:
    """The audit of a job whose training steps call a function of this module with their loss."""
    with _calling(globals()[name]):
        return audited_here(*arguments, ranks=ranks)


@contextmanager
def _calling(function: Callable[[Any], None]) -> Iterator[None]:
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    stock = MegatronGPTModel.training_step

    def training_step(self: Any, dataloader_iter: Any) -> Any:  # Lightning looks at the name
        loss = stock(self, dataloader_iter)
        function(loss)
        return loss

    MegatronGPTModel.training_step = training_step
    try:
        yield
    finally:
        MegatronGPTModel.training_step = stock


def reads_the_loss(loss: Any) -> None:
    loss.item()


def reads_and_falls_off(loss: Any) -> None:
    """Of what the host gave the device, so that both can be done."""
    import torch

    given = torch.ones(2).to(loss.device)
    given.to("cpu")
    torch.logaddexp(given, given)


SMALL = ["model.num_layers=2", "model.global_batch_size=4"]  # 2 micro-batches: nothing is left out


def test_copies_of_kv_heads_sequence_parallelism_and_sharded_optimizer(audited: Callable[..., dict[str, Any]]) -> None:
    """TP 4 of 2 KV heads x DP 2."""
    found = audited([*TP4, *SMALL], 8, ranks=[0])
    [rank] = found["ranks"]
    assert found["lowered_layers"] == [2] and found["lowered_micro_batches"] == [2]
    assert found["graphs"] == 2  # the first step's, and that of the second and the third
    assert found["flops"] == pytest.approx(rank["analytic"]["hardware"], rel=1e-9)
    assert rank["sent_bytes"] / rank["least_bytes"] == pytest.approx(1, abs=0.02)
    assert found["host_transfers"] == {} and found["fallbacks"] == {}
    assert found["mismatch"] is None and found["compared"] == 0
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
@pytest.mark.parametrize(
    ("special", "experts", "parts"),
    [
        (["model.tensor_model_parallel_size=4", "++model.num_moe_experts=4", "++model.moe_router_topk=2"], 4, 1),
        (["model.tensor_model_parallel_size=2", "model.context_parallel_size=2"], 0, 2),
    ],
)
def test_experts_and_parts_of_a_sequence_have_an_mfu(
    audited: Callable[..., dict[str, Any]], special: list[str], experts: int, parts: int
) -> None:
    """Of the model's FLOPs, counted here, at SMALL's sizes; what the hardware does with parts is not known by hand."""
    found = audited([*TP4[1:], *SMALL, *special], 4, ranks=[0])
    bounds, core = found["ranks"][0]["bounds"], instance("trn2.48xlarge").core()
    tp, tokens, hidden, queries, groups, features, seq = 4 // parts, 64 // parts, 64, 8, 2, 8, 64
    mlp = 3 * 2 * tokens * hidden * 96 / tp * (2 if experts else 1) + 2 * tokens * hidden * experts / tp
    layer = 2 * tokens * hidden * features * (2 * queries / tp + 2 * max(groups / tp, 1)) + mlp
    pairs = seq * seq if parts == 1 else seq * (seq + 1) / 2 / parts
    scores = 2 * 2 * queries / tp * features * pairs
    model = 4 * 3 * (2 * (layer + scores) + 2 * tokens * hidden * 512 / tp)  # 4 micro-batches, 2 layers
    assert bounds["mfu"] * bounds["step"] * core.flops["bfloat16"] == pytest.approx(model, rel=1e-9)
    assert found["mfu_bound"] == bounds["mfu"] and (found["ranks"][0]["analytic"] is None) == (parts > 1)


@pytest.mark.slow
def test_what_has_no_formula_has_no_mfu(audited: Callable[..., dict[str, Any]]) -> None:
    """Of some layers the MLP is experts."""
    few = ["++model.num_moe_experts=4", "++model.moe_router_topk=2", "++model.moe_layer_freq=2"]
    found = audited([*TP4, *SMALL, *few], 4, ranks=[0])
    assert found["mfu_bound"] is None and found["ranks"][0]["bounds"]["step"] > 0


def reads_of_a_step() -> dict[str, str]:
    """What is said of each way to read a tensor that a step computes, and of those that a step may read."""
    import torch
    import torch_xla
    from torch_xla.core.xla_builder import create_placeholder_tensor

    from nxdt_nemo.audit.lowering import _reads
    from nxdt_nemo.errors import UserError

    there, here = create_placeholder_tensor([1], torch.float32), torch.zeros(1)
    ways: dict[str, Callable[[], object]] = {
        "item": lambda: (there + 1).item(),
        "tolist": lambda: there.tolist(),
        "cpu": lambda: there.cpu(),
        "to": lambda: there.to("cpu"),
        "to a dtype too": lambda: there.to(device="cpu", dtype=torch.float64),
        "copy_": lambda: here.copy_(there),
        "bool": lambda: bool(there > 0),
        "float": lambda: float(there),
        "equal": lambda: torch.equal(there, there + 1),
        "nonzero": lambda: torch.nonzero(there),
        "none": lambda: there.to(torch.float64) + here.to(torch_xla.device()).copy_(there),
    }
    said = {}
    with _reads() as reads:
        reads.in_step = True
        for name, read in ways.items():
            try:
                read()
            except UserError as error:
                said[name] = str(error)
        reads.found.clear()
        given = torch.ones(1).to(torch_xla.device())
        assert given.cpu() == given.to("cpu") == 1
        assert reads.found.total() == 2
    return said


def test_a_tensor_that_a_step_computes_is_not_read(pool: RankPool) -> None:
    [said] = pool.run(reads_of_a_step)
    wanted = {"item", "tolist", "cpu", "to", "to a dtype too", "copy_", "bool", "float", "equal", "nonzero"}
    assert said.keys() == wanted
    assert all(re.match(r"\S*test_audit.py:\d+: a step reads a tensor of the device", line) for line in said.values())


@pytest.mark.slow
def test_what_a_step_reads_and_what_falls_off_xla_is_listed(pool: RankPool) -> None:
    one = [*TP4, "model.num_layers=1", "model.global_batch_size=2"]
    [found] = pool.run(audited_while, "reads_and_falls_off", [0], one, 8)
    assert found["fallbacks"] == {"aten::logaddexp": 1}
    [(place, times)] = found["host_transfers"].items()
    assert times == 1 and "test_audit.py:" in place
    with pytest.raises(RankError, match=r"test_audit.py:\d+: a step reads a tensor of the device there \(item\)"):
        pool.run(audited_while, "reads_the_loss", [0], one, 8)


@pytest.mark.slow
def test_a_sequence_cut_among_ranks(audited: Callable[..., dict[str, Any]]) -> None:
    """TP 2 x CP 2: parts of attention add up in operations that XLA has."""
    cut = ["model.tensor_model_parallel_size=2", "model.context_parallel_size=2", "model.global_batch_size=2"]
    found = audited([*cut, "model.pipeline_model_parallel_size=1", "model.num_layers=1"], 4, ranks=[0, 1, 2])
    assert found["fallbacks"] == {} and found["host_transfers"] == {} and found["mismatch"] is None
    assert found["compared"] == 3
    assert (0, 2) in {tuple(row["ranks"]) for row in found["collectives"]}


@pytest.mark.slow
def test_a_rank_with_other_sizes_parts_though_small_steps_are_alike(audited: Callable[..., dict[str, Any]]) -> None:
    """Named by --except alone it is lowered too."""
    few = ["model.num_layers=3", "model.global_batch_size=2"]
    found = audited([*TP4, *few], 8, ranks=[0], on={1: ["model.num_layers=4"]})
    assert "rank 1 has 4 layers and 1 micro-batches, the others have 3 layers and 1 micro-batches" in found["mismatch"]
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1] and found["compared"] == 1
    few = ["model.num_layers=1", "model.global_batch_size=8"]
    found = audited([*TP4, *few], 8, ranks=[0], on={1: ["model.global_batch_size=16"]})
    assert "rank 1 has 1 layers and 8 micro-batches" in found["mismatch"]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world"), [(TP4, 8), (PP2, 8)])
def test_lines_through_small_steps_are_the_whole_step(
    audited: Callable[..., dict[str, Any]], layout: list[str], world: int
) -> None:
    small, whole = audited(layout, world), audited(layout, world, whole=True)
    for one, all_of_it in zip(small["ranks"], whole["ranks"], strict=True):
        for name in ("flops", "parameters", "sent_bytes", "state_bytes"):
            assert one[name] == pytest.approx(all_of_it[name], rel=1e-3), name
        # In a pipeline's first stage the list schedule looks up embeddings of later micro-batches ahead: 1.1 % here.
        assert one["peak_bytes"] == pytest.approx(all_of_it["peak_bytes"], rel=0.02)
    assert small["mismatch"] is None and whole["mismatch"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "world"), [(2, 8), (3, 6)])
def test_every_rank_of_a_pipelines_world(
    audited: Callable[..., dict[str, Any]], pool: RankPool, stages: int, world: int
) -> None:
    """Ranks of a stage run one program: each of the last one sends the loss to its own of the first, once."""
    layout, each = [*PP2, f"model.pipeline_model_parallel_size={stages}"], world // stages
    found = audited(layout, world, ranks=[*range(world)])
    assert found["mismatch"] is None
    stage_of = {rank["program"]: rank["stage"][0] for rank in found["ranks"]}
    assert [stage_of[rank["program"]] for rank in found["ranks"]] == [rank // each for rank in range(world)]
    assert len(stage_of) == stages
    for rank in found["ranks"]:
        here = rank["rank"]
        pair = [here % each, here % each + world - each]  # of its pipeline the first and the last
        losses = [row for row in rank["transfers"] if row["ranks"] == pair and is_loss(row)]
        assert len(losses) == (here in pair)
    if stages == 2:
        [parted] = pool.run(audited_while, "from_the_last_rank_to_the_first", [0, 1], layout, world)
        assert len({rank["program"] for rank in parted["ranks"]}) == 2, "what NeMo does by itself"
        assert parted["mismatch"] is None


def is_loss(row: dict[str, Any]) -> bool:
    """One number, once in a step."""
    return bool((row["kind"], row["dtype"], row["times"], row["received"]) == ("all-gather", "f32", 1, 4))


def from_the_last_rank_to_the_first(loss: Any) -> None:
    import torch.distributed as dist

    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        dist.send(loss, 0)
    elif dist.get_rank() == 0:
        dist.recv(loss, last)


@pytest.mark.slow
def test_a_pipeline_stage_with_another_batch_stands_still(audited: Callable[..., dict[str, Any]]) -> None:
    found = audited(PP2, 8, ranks=[0, 4], on={4: ["model.encoder_seq_length=32", "model.max_position_embeddings=32"]})
    assert "ranks 0 and 4" in found["mismatch"]
