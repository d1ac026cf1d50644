"""What layouts send, counted, against the arithmetic of nxdt_nemo/megatron/communication.py: to the byte.

All layouts are `make test-communication` (tools/communication.py); here are some, and what turns them red.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from nxdt_nemo.errors import LayoutError
from nxdt_nemo.megatron.communication import Model, Step, sent, stages_of
from nxdt_nemo.testing.communication import CommunicationRow, Counted, counted, job_of, rows
from nxdt_nemo.testing.matrix import recipe_of
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.recipe import Family

Fields = dict[str, Any]
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def wasteful(*case: Any) -> Counted:
    """One all-reduce more in a step, of a gradient that has been reduced already, by the tensor-parallel ranks."""
    from importlib import import_module
    from unittest import mock

    import torch.distributed as dist
    from megatron.core import parallel_state

    module = import_module("megatron.core.distributed.finalize_model_grads")
    upstream = module._allreduce_embedding_grads

    def twice(model: Any, config: Any) -> None:
        upstream(model, config)
        norm = next(p for chunk in model for name, p in chunk.named_parameters() if "layernorm" in name)
        dist.all_reduce(norm.main_grad, group=parallel_state.get_tensor_model_parallel_group())

    with mock.patch.object(module, "_allreduce_embedding_grads", twice):
        return counted(*case)


def idle(*case: Any) -> Counted:
    """The gradients' norm is not reduced."""
    from unittest import mock

    from megatron.core.optimizer import optimizer

    with mock.patch.object(optimizer, "get_grad_norm_fp32", return_value=1.0):
        return counted(*case)


def reports(gloo: Gloo, family: Family, name: str, function: Any = counted, fields: Fields | None = None) -> Any:
    """What to expect, and what each rank has counted."""
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    recipe, place = recipe_of(family, name)
    found = gloo(place.world, function, recipe, place, fields or {}, init=ACTIVE, env=ACTIVE_ENV)
    return job_of(recipe, place, fields), found


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "name", "fields"),
    [
        ("llama", "tp2", {}),
        ("gpt", "tp2sp", {}),
        ("gpt", "pp2vpp2", {}),
        ("llama", "cp2", {}),
        ("mixtral", "ep2dp2+zero", {}),
        pytest.param("gpt", "tp2", FULL, marks=pytest.mark.slow),
        pytest.param("llama", "cp2", {"cp_comm_type": "a2a"}, marks=pytest.mark.slow),
        pytest.param("mixtral", "ep2dp2", {}, marks=pytest.mark.slow),
        pytest.param("mixtral", "tp2spep2etp1", {}, marks=pytest.mark.slow),
        pytest.param("mixtral", "tp2sp", {}, marks=pytest.mark.slow),
        pytest.param("gpt", "tp2sppp2vpp2", {}, marks=pytest.mark.slow),
        pytest.param("mixtral", "ep2dp2+grouped+static", {}, marks=pytest.mark.slow),
        pytest.param("bert", "tp2sp", {}, marks=pytest.mark.slow),
        pytest.param("t5", "tp2sp", {}, marks=pytest.mark.slow),
        pytest.param("t5", "pp2", {}, marks=pytest.mark.slow),
    ],
)
def test_what_is_sent_is_what_is_expected(gloo: Gloo, family: Family, name: str, fields: Fields) -> None:
    job, ranks = reports(gloo, family, name, fields=fields)
    together = rows(*job, ranks)
    assert all(row.good for row in together), [row for row in together if not row.good]
    assert sum(row.bytes for row in together) > 100_000
    for rank in ranks if job[1].ep == 1 else []:  # what one sends depends on the routing where experts are divided
        assert all(row.good for row in rows(*job, [rank])), rank


@pytest.mark.ranks
def test_one_all_reduce_more_turns_its_row_red(gloo: Gloo) -> None:
    job, ranks = reports(gloo, "llama", "tp2", wasteful)
    [row] = [row for row in rows(*job, ranks) if not row.good]
    assert (row.group, row.collective, row.verdict) == ("tp", "all_reduce", "UNEXPLAINED")
    assert row.bytes - row.expected == 2 * 64 * 4
    assert row.places[-1].startswith("test_communication.py")


@pytest.mark.ranks
def test_one_all_reduce_less_turns_its_row_red(gloo: Gloo) -> None:
    job, ranks = reports(gloo, "llama", "tp2", idle)
    [row] = [row for row in rows(*job, ranks) if not row.good]
    assert (row.group, row.verdict, row.bytes, row.expected) == ("tp-pp", "TOO FEW", 0, 2 * 4)


def test_verdicts() -> None:
    def row(nbytes: int, least: int, expected: int, why: str = "") -> CommunicationRow:
        return CommunicationRow("tp", "all_reduce", 1, nbytes, least, expected, why, ())

    assert row(102, 100, 102).verdict == "least"
    assert row(103, 100, 103).verdict == "UNEXPLAINED"
    assert row(103, 100, 103, "a reason").verdict == "explained"
    assert row(104, 100, 103, "a reason").verdict == "UNEXPLAINED"
    assert row(0, 0, 0).verdict == "UNEXPLAINED"  # a barrier


LLAMA = Model(layers=32, hidden=4096, heads=32, kv_groups=8, head=128, ffn=14336, vocab=128256, gated=True,
              biases=False, norm=1, tied=False, width=2)  # fmt: skip


def total(step: Step, collective: str, group: str, stage: int = 0) -> int:
    return sum(one.least for one in sent(LLAMA, step, stage) if (one.collective, one.group) == (collective, group))


def test_a_llama_by_hand() -> None:
    """Llama 3 8B, 8192 tokens, one micro-batch: figures that do not come from this package."""
    n = 8192 * 4096 * 2  # bytes of an activation
    whole = stages_of(32)
    tp = Step(8192, 1, 1, whole, tp=8)
    assert total(tp, "all_reduce", "tp") == 4 * 32 * n + 2 * n + 3 * 8192 * 4  # Shoeybi et al.: 4 a layer
    sp = Step(8192, 1, 1, whole, tp=8, sp=True)
    assert total(sp, "all_gather", "tp") == 6 * 32 * n + 3 * n
    assert total(sp, "reduce_scatter", "tp") == 4 * 32 * n + 2 * n
    parameters = 8_030_261_248  # of the published model
    assert total(Step(8192, 1, 1, whole, dp=4), "all_reduce", "dp-cp") == 4 * parameters
    zero = Step(8192, 1, 1, whole, dp=4, zero=True)
    assert total(zero, "reduce_scatter", "dp-cp") == 4 * parameters
    assert total(zero, "all_gather", "dp-cp") == 2 * parameters
    pipeline = Step(8192, 1, 16, stages_of(32, 4, 2), tp=8, sp=True)
    assert [total(pipeline, "send", "pp", stage) for stage in range(4)] == [16 * n // 8 * k for k in (3, 4, 4, 3)]
    kv = 8192 // 4 * 8 * 128 * 2 * 2  # keys and values of a rank
    assert total(Step(8192, 1, 1, whole, cp=4), "send", "cp") == 32 * 3 * 3 * kv


def test_a_bert_and_a_t5_by_hand() -> None:
    """H 1024, 24 layers; of a T5 2 encoder's and 3 decoder's. Figures written out as a layer's weights are."""
    h, vocab = 1024, 30592
    model = Model(layers=24, hidden=h, heads=16, kv_groups=16, head=64, ffn=4 * h, vocab=vocab, learned=512,
                  masked=True, logits=True)  # fmt: skip
    ends = vocab * h + 512 * h + vocab + 2 * h  # embeddings, the output layer's biases, the last norm

    def whole(model: Model, step: Step) -> int:
        return sum(one.least for one in sent(model, step, 0) if one.group == "dp-cp")

    bert = 24 * (12 * h * h + 13 * h) + ends + h * h + 3 * h
    assert whole(model, Step(512, 1, 1, stages_of(24), dp=2)) == 4 * bert
    model = replace(model, masked=False)
    t5 = 2 * (12 * h * h + 13 * h) + 3 * (16 * h * h + 19 * h) + ends + 2 * h
    step = Step(128, 1, 1, ((3,),), encoder=(2,), encoder_seq=512)
    assert whole(model, replace(step, dp=2)) == 4 * t5
    n, x = 128 * h * 4, 512 * h * 4
    reduced = [one for one in sent(model, replace(step, tp=2), 0) if one.group == "tp"]
    pairs = 2 * (2 * 2 * x + 3 * 3 * n)  # two a layer of the encoder's, three of the decoder's, there and back
    rest = x + 2 * n + 3 * 128 * 4  # embeddings, the output layer, the loss
    assert sum(one.least for one in reduced) == pairs + x + rest
    assert sum(one.bytes for one in reduced) == pairs + 3 * x + rest
    with pytest.raises(LayoutError, match="no arithmetic of an encoder with recomputation"):
        sent(model, replace(step, recompute=True), 0)


def test_how_layers_are_dealt() -> None:
    assert stages_of(8, 2, 2) == ((2, 2), (2, 2))
    assert stages_of(4, 2, first=1) == ((1,), (3,))
    assert stages_of(4, 3, account=True) == ((1,), (2,), (1,))
    assert stages_of(6, 3, first=1, last=1) == ((1,), (4,), (1,))
    assert stages_of(4, 2, 2, cut=(1, 0, 2, 1)) == ((1, 2), (0, 1))
    with pytest.raises(LayoutError, match="does not cut 5 layers"):
        stages_of(5, 2, cut=(1, 3))
    for asked in ((5, 2), (4, 2, 4)):
        with pytest.raises(LayoutError, match=f"{asked[0]} layers cannot be dealt out to 2 pipeline ranks"):
            stages_of(*asked)


def test_the_arithmetic_loads_no_torch() -> None:
    code = "import sys, nxdt_nemo.megatron.communication; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
