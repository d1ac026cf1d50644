"""What a NeMo configuration needs on one NeuronCore, coarsely, against what the instance that it names has.

Room megatron/. Between config/, which reads keys, and memory.py, which has the formula. Imports no torch. Coarse: the
formula is for decoders without experts, so experts' weights are added by hand; uneven stages count as the fullest; a
kernel's, the compiler's and the runtime's own memory are not in it. Proof: tests/megatron/test_memory_of_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from nxdt_nemo.config.checks import SHARDED
from nxdt_nemo.config.instances import GIB, INSTANCES
from nxdt_nemo.config.job import job_of
from nxdt_nemo.config.neuron import neuron_section
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError
from nxdt_nemo.megatron.memory import FLOAT, Estimate, Job, Recompute, estimate

__all__ = ["Need", "doubts", "errors", "need"]

VOCABULARY = 50257  # GPT-2's, where nothing says how many pieces there are


@dataclass(frozen=True)
class Need:
    """Bytes on one rank of the first stage, which has the embedding and most micro-batches in flight.

    fixed        weights, gradients, optimizer, buffers
    activations  the most that a step needs beyond them
    has          of one logical NeuronCore
    """

    fixed: int
    activations: int
    has: int
    instance: str
    assumed: str = ""

    def __str__(self) -> str:
        total = (self.fixed + self.activations) / GIB
        parts = f"{self.fixed / GIB:.1f} GiB of states, {self.activations / GIB:.1f} GiB of activations"
        return f"{total:.1f} of {self.has / GIB:.0f} GiB a NeuronCore of {self.instance} ({parts}){self.assumed}"


def need(view: View, ranks: int | None) -> Need | None:
    """None where it cannot be told: no instance named, another kind of model, no number of ranks."""
    instance = INSTANCES.get(str(view.get("neuron.instance")))
    numbers = ("num_layers", "hidden_size", "num_attention_heads", "encoder_seq_length")
    if instance is None or ranks is None or not view.training or not view.get("model.mcore_gpt", False):
        return None
    if view.get("neuron.runtime") == "cpu" or any((view.number(f"model.{name}") or 0) < 1 for name in numbers):
        return None
    job = _job(view, ranks)
    if job is None:
        return None
    found, trained = estimate(job), view.get("model.peft.peft_scheme") in (None, "none")
    more = _experts(view, job, trained)
    fixed = (found.fixed if trained else found.weights + found.buffers) + more
    has = instance.core(job_of(view, neuron_section(view.cfg, place=view.place)).cores_a_rank).hbm
    assumed = "" if view.number("neuron.vocab_size") else f"; {VOCABULARY:,} pieces assumed: set neuron.vocab_size"
    return Need(fixed, _activations(view, found), has, instance.name, assumed)


def errors(view: View, ranks: int | None) -> Iterator[ConfigError]:
    """States that do not fit, whatever a step does."""
    found = need(view, ranks)
    if found is not None and found.fixed > found.has:
        yield view.error(f"memory: needs {found}", "use more tensor or pipeline parallelism, or more nodes with ZeRO-1")


def doubts(view: View, ranks: int | None) -> Iterator[ConfigError]:
    """States that fit, and a step that does not, by a coarse formula."""
    found = need(view, ranks)
    if found is not None and found.fixed <= found.has < found.fixed + found.activations:
        yield view.error(
            f"memory: needs {found}", "recompute (activations_checkpoint_granularity=full) or use more ranks"
        )


def _job(view: View, ranks: int) -> Job | None:
    tp, cp = view.size("model.tensor_model_parallel_size"), view.size("model.context_parallel_size")
    pp, micro = view.size("model.pipeline_model_parallel_size"), view.size("model.micro_batch_size")
    layers, heads = view.size("model.num_layers"), view.size("model.num_attention_heads")
    hidden, seq = view.size("model.hidden_size"), view.size("model.encoder_seq_length")
    dp = ranks // (tp * cp * pp)
    if not dp or heads % tp or seq % (cp * tp):
        return None
    whole = view.number("model.global_batch_size") or micro * dp
    unit = tp * (view.number("model.make_vocab_size_divisible_by") or 128)
    vocab = -(-(view.number("neuron.vocab_size") or VOCABULARY) // unit) * unit
    half = bool(view.get("model.megatron_amp_O2", False))
    recompute: Recompute = {"full": "full", "selective": "selective"}.get(  # type: ignore[assignment]
        str(view.get("model.activations_checkpoint_granularity")), "none"
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if half else "float32"
    return Job(
        layers=-(-layers // pp) * pp,
        hidden=hidden,
        ffn=view.number("model.ffn_hidden_size") or 4 * hidden,
        heads=heads,
        vocab=vocab,
        seq=seq,
        micro_batch=micro,
        micro_batches=max(1, whole // (micro * dp)),
        groups=view.number("model.num_query_groups") or 0,
        head_size=view.number("model.kv_channels") or 0,
        gated="glu" in str(view.get("model.activation", "gelu")),
        rms_norm="rms" in str(view.get("model.normalization", "layernorm")).lower(),
        bias=bool(view.get("model.bias", True)),
        tied=bool(view.get("model.share_embeddings_and_output_weights", True)),
        rope=view.get("model.position_embedding_type") == "rope",
        dtype=dtype,
        tp=tp,
        sp=bool(view.get("model.sequence_parallel", False)),
        cp=cp,
        pp=pp,
        dp=dp,
        zero=view.get("model.optim.name") in SHARDED,
        recompute=recompute,
        hidden_dropout=bool(view.get("model.hidden_dropout", 0.1)),
        attention_dropout=bool(view.get("model.attention_dropout", 0.1)),
    )


def _experts(view: View, job: Job, trained: bool) -> int:
    """Bytes of all experts of a rank but the one that the formula counts."""
    number = view.number("model.num_moe_experts")
    if not number:
        return 0
    each = job.hidden * job.ffn // job.tp * (3 if job.gated else 2)
    own = max(number // view.size("model.expert_model_parallel_size"), 1)
    count = job.layers // job.pp * (own - 1) * each
    state = count * FLOAT * (3 if job.item == 2 else 2)
    if not trained:
        return count * job.item
    return count * (job.item + FLOAT) + (state // (job.dp * job.cp) if job.zero else state)


def _activations(view: View, found: Estimate) -> int:
    """A token goes through several experts."""
    routes = view.number("model.moe_router_topk", 2) or 1
    return found.activations * (routes if view.number("model.num_moe_experts") else 1)
