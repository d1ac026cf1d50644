"""What a rank of a NeMo configuration has to compute and to send, counted by hand: what its graphs are held against.

Room audit/. Reads the configuration for formula.py and for megatron/communication.py, and says None for what they do
not know. Proof: tests/audit/test_audit.py, tests/audit/test_experts.py.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nxdt_nemo.audit.formula import Count, Decoder, count
from nxdt_nemo.audit.lowering import Lowered

if TYPE_CHECKING:
    from nxdt_nemo.megatron.transformer.moe.token_dispatcher import Bound

__all__ = ["hardware_flops", "model_flops", "sent_bytes"]


def sent_bytes(config: Any, lowered: Lowered, micro_batches: int) -> tuple[float | None, float | None]:
    """Bytes of whole tensors that a step of so many micro-batches has to send on this rank, and that it is known to;
    None for context parallelism, uneven stages, and experts that the arithmetic is not of (docs/audit.md)."""
    from nxdt_nemo.megatron.communication import NOT_LEFT_OUT, Model, Step, sent, stages_of

    model = config.model
    stage, stages = lowered.stage
    half = "bf16" in str(config.trainer.precision)
    if not _alike(model, stages) or _context_parallel(model) > 1 or not _plain_experts(model, half=half):
        return None, None
    tp, heads = _tensor_parallel(model), int(model.num_attention_heads)
    groups, gated = int(model.get("num_query_groups") or heads), "glu" in str(model.get("activation", "gelu"))
    learned = model.get("position_embedding_type", "learned_absolute") == "learned_absolute"
    balancing = model.get("moe_router_load_balancing_type", "aux_loss")
    decoder = Model(
        layers=int(model.num_layers),
        hidden=int(model.hidden_size),
        heads=heads,
        kv_groups=groups,
        head=int(model.get("kv_channels") or model.hidden_size // heads),
        ffn=_expert_ffn(model),
        vocab=lowered.vocab * tp,
        gated=gated,
        biases=bool(model.get("bias", True)),
        norm=1 if "rms" in str(model.get("normalization", "layernorm")) else 2,
        learned=int(model.max_position_embeddings) if learned else 0,
        tied=bool(model.get("share_embeddings_and_output_weights", True)),
        experts=int(model.get("num_moe_experts") or 0),
        topk=int(model.get("moe_router_topk", 2)),
        balanced=bool(model.get("moe_aux_loss_coeff", 0)) and balancing == "aux_loss",
        width=2 if half else 4,
    )
    step = Step(
        seq=int(model.encoder_seq_length),
        micro_batch=int(model.micro_batch_size),
        micro_batches=micro_batches,
        stages=stages_of(decoder.layers, stages),
        tp=tp,
        dp=lowered.world // (tp * stages),
        ep=int(model.get("expert_model_parallel_size") or 1),
        etp=tp,  # NeMo's strategy knows no other
        sp=bool(model.get("sequence_parallel")),
        zero=str(model.optim.name) in ("distributed_fused_adam", "mcore_distributed_optim"),
        recompute=str(model.get("activations_checkpoint_granularity") or "") == "full",
        grouped=bool(model.get("moe_grouped_gemm", False)),
        static=True,
    )
    terms = [term for term in sent(decoder, step, stage) if term.why != NOT_LEFT_OUT]  # a graph leaves it out
    return float(sum(term.least for term in terms)), float(sum(term.bytes for term in terms))


def hardware_flops(config: Any, lowered: Lowered) -> Count | None:
    """Of a micro-batch on this rank. None where model_flops is, and for context parallelism: which scores a part makes
    is not known by hand."""
    model, block = config.model, _block(config.model)
    if block is None or not _alike(model, lowered.stage[1]) or _context_parallel(model) > 1:
        return None
    return count(_part(model, lowered, block))


def model_flops(config: Any, lowered: Lowered) -> float | None:
    """Of a micro-batch, what the model needs of this rank: experts and parts of a sequence too, a share of all ranks'.
    None for uneven stages, layers of which some have experts, and scores of which the batch has the mask."""
    model, context = config.model, _context_parallel(config.model)
    block = _block(model) if context == 1 else 1 if model.get("get_attention_mask_from_fusion", True) else None
    if block is None or not _alike(model, lowered.stage[1]):
        return None
    return count(replace(_part(model, lowered, block), context=context)).model


def _alike(model: Any, stages: int) -> bool:
    """Layers that are all of one kind, as many in each stage."""
    experts = model.get("num_moe_experts") and model.get("moe_layer_freq", 1) != 1
    return not experts and int(model.num_layers) % stages == 0


def _plain_experts(model: Any, *, half: bool) -> bool:
    """No experts, or such as the arithmetic of communication is of: no token is dropped, none is mixed with those of
    other ranks, each expert has room for all, and a token's probability has four bytes."""
    if not model.get("num_moe_experts"):
        return True
    own, routed = model.get("mcore_customization_config") or {}, str(model.get("moe_router_dtype"))
    bound = _bound(model)
    return (
        bound.factor is None
        and bound.capacity is None
        and own.get("token_shuffle_group_size", 1) == 1
        and not model.get("moe_shared_expert_intermediate_size")
        and model.get("moe_router_load_balancing_type", "aux_loss") in ("aux_loss", "none")
        and (routed == "fp32" or (routed == "None" and not half))
    )


def _experts(model: Any) -> tuple[float, float, float, float]:
    """A Decoder's experts, shared, padded and router."""
    experts, tp = int(model.get("num_moe_experts") or 0), _tensor_parallel(model)
    if not experts:
        return 1.0, 0.0, 0.0, 0.0
    shared = int(model.get("moe_shared_expert_intermediate_size") or 0) / _expert_ffn(model)
    topk, parts = int(model.get("moe_router_topk", 2)), tp * _context_parallel(model)  # experts divide the sequence
    tokens = int(model.encoder_seq_length) * int(model.micro_batch_size) // parts
    rows = _bound(model).rows(tokens, topk, experts)
    return topk, shared, experts * rows / tokens - topk, experts / tp


def _bound(model: Any) -> Bound:
    """What room an expert has."""
    from nxdt_nemo.megatron.transformer.moe.token_dispatcher import Bound

    own, factor = model.get("mcore_customization_config") or {}, model.get("moe_expert_capacity_factor")
    capacity = None if factor is None or factor < 0 else factor
    found = Bound.of(SimpleNamespace(**{**own, "moe_expert_capacity_factor": capacity}), ragged=False)
    assert found is not None
    return found


def _expert_ffn(model: Any) -> int:
    """Hidden values of an expert; without experts of the MLP."""
    own = model.get("moe_ffn_hidden_size") if model.get("num_moe_experts") else None
    return int(own or model.ffn_hidden_size)


def _tensor_parallel(model: Any) -> int:
    return int(model.get("tensor_model_parallel_size") or 1)


def _context_parallel(model: Any) -> int:
    return int(model.get("context_parallel_size") or 1)


def _part(model: Any, lowered: Lowered, block: int) -> Decoder:
    """This rank's part of a model whose sequence is whole."""
    stage, stages = lowered.stage
    tp, heads = _tensor_parallel(model), int(model.num_attention_heads)
    groups = int(model.get("num_query_groups") or heads)
    layers, seq = int(model.num_layers) // stages, int(model.encoder_seq_length)
    asked = str(model.get("activations_checkpoint_granularity") or "")
    some = int(model.get("activations_checkpoint_num_layers") or layers)
    every = asked == "selective" or model.get("activations_checkpoint_method") == "uniform"
    seen = int((model.get("window_size") or (-1,))[0])
    experts, shared, padded, router = _experts(model)
    return Decoder(
        layers=layers,
        hidden=int(model.hidden_size),
        seq=seq,
        batch=int(model.micro_batch_size),
        queries=heads // tp,
        groups=max(groups // tp, 1),
        features=int(model.get("kv_channels") or model.hidden_size // heads),
        ffn=_expert_ffn(model) // tp,
        gated="glu" in str(model.get("activation", "gelu")),
        vocab=lowered.vocab,
        head=stage == stages - 1,
        block=block,
        window=seen if seen >= 0 else None,
        recompute="full" if asked == "full" else "selective" if asked == "selective" else "",
        recomputed_layers=(layers if every else min(some, layers)) if asked else 0,
        experts=experts,
        shared=shared,
        padded=padded,
        router=router,
    )


def _block(model: Any) -> int | None:
    """Queries of a block of the model's attention, 0 where its scores are made whole; None for what the formula does
    not know: blocks that are not causal, and what cuts the sequence among ranks."""
    import torch

    from nxdt_nemo.megatron.transformer.attention_choice import Call, choose
    from nxdt_nemo.megatron.transformer.blocked_attention import BLOCK

    heads, seq = int(model.num_attention_heads), int(model.encoder_seq_length)
    features = int(model.get("kv_channels") or model.hidden_size // heads)
    causal = bool(model.get("get_attention_mask_from_fusion", True))  # otherwise the batch has a mask
    name = choose(
        Call(
            lane="xla",
            dtype=torch.bfloat16,
            queries=seq,
            keys=seq,
            heads=heads,
            groups=int(model.get("num_query_groups") or heads),
            features=features,
            values=features,
            causal=causal,
            masked=not causal,
            alibi=model.get("position_embedding_type") == "alibi",
            window=bool(model.get("window_size")),
            dropout=float(model.get("attention_dropout", 0.1)) > 0,
            parts=_context_parallel(model),
        )
    ).name
    return {"upstream": 0, "sdpa": 0, "blocked": BLOCK if causal else None}.get(name)
