"""Memory from a configuration: the formula's own figures, and what is added by hand."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config.instances import GIB
from nxdt_nemo.config.view import View
from nxdt_nemo.megatron.memory import Job, estimate
from nxdt_nemo.megatron.memory_of_config import doubts, errors, need

MODEL = {
    "mcore_gpt": True,
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 11008,
    "num_attention_heads": 32,
    "encoder_seq_length": 4096,
    "micro_batch_size": 1,
    "global_batch_size": 16,
    "tensor_model_parallel_size": 8,
    "activation": "fast-swiglu",
    "normalization": "rmsnorm",
    "bias": False,
    "share_embeddings_and_output_weights": False,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "megatron_amp_O2": True,
    "optim": {"name": "mcore_distributed_optim"},
}


def view(neuron=None, trainer=None, **changes) -> View:
    ours = {"instance": "trn1.32xlarge", "vocab_size": 32000} | (neuron or {})
    return View(OmegaConf.create({"trainer": trainer or {"devices": 32}, "model": MODEL | changes, "neuron": ours}))


def test_it_is_the_formulas():
    job = Job(
        layers=32, hidden=4096, ffn=11008, heads=32, vocab=32768, seq=4096, micro_batches=4, gated=True, rms_norm=True,
        bias=False, tied=False, rope=True, dtype="bfloat16", tp=8, dp=4, zero=True,
    )  # fmt: skip
    found, formula = need(view(), 32), estimate(job)
    assert (found.fixed, found.activations) == (formula.fixed, formula.activations)
    assert found.has == 16 * GIB


@pytest.mark.parametrize(
    "neuron, devices, gib", [({}, 64, 24), ({}, 128, 12), ({"lnc": 1}, 64, 12), ({"lnc": 2}, 128, 24)]
)
def test_a_rank_has_the_memory_of_its_cores(neuron, devices, gib):
    assert need(view({"instance": "trn2.48xlarge"} | neuron, {"devices": devices}), devices).has == gib * GIB


def test_experts_are_added():
    moe = {"num_moe_experts": 8, "moe_router_topk": 2, "sequence_parallel": True}
    whole, shared = need(view(**moe), 32), need(view(**moe, expert_model_parallel_size=4), 32)
    assert whole.fixed > shared.fixed > need(view(sequence_parallel=True), 32).fixed


def test_frozen_weights_have_neither_gradients_nor_states():
    assert need(view(peft={"peft_scheme": "lora"}), 32).fixed < need(view(), 32).fixed / 2


@pytest.mark.parametrize("changes", [{"mcore_gpt": False}, {"num_layers": "x"}, {"tensor_model_parallel_size": 64}])
def test_where_it_cannot_be_told(changes):
    assert need(view(**changes), 32) is None
    assert need(view({"instance": None}), 32) is None
    assert need(view(), None) is None


def test_what_does_not_fit_is_an_error_and_a_step_that_does_not_a_doubt():
    alone = view(tensor_model_parallel_size=1)
    (error,) = errors(alone, 32)
    assert "GiB a NeuronCore of trn1.32xlarge" in str(error)
    long = view(encoder_seq_length=32768, sequence_parallel=False)
    assert list(errors(long, 32)) == []
    assert len(list(doubts(long, 32))) == 1
    assert list(doubts(view(activations_checkpoint_granularity="full"), 32)) == []
