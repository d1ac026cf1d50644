"""The tiny models of a parity run, as megatron-core builds them: one of five families, whole or a pipeline stage.

Room testing/. Imports torch, megatron-core and nxdt_nemo.testing.recipe (data); the layer specs are the caller's, so
that stock and ours share everything but these. Proof: tests/megatron/test_parity.py, tests/megatron/test_layouts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nxdt_nemo.testing.recipe import Batch, Recipe, transformer_fields

if TYPE_CHECKING:
    import torch

__all__ = ["Specs", "Stage", "build", "config_of", "losses_of", "mean_of", "stock_specs"]

Specs = Callable[[str, Any, int | None], Any]
"""(block, TransformerConfig, virtual stage) -> layer spec; block is "gpt", "bert", "t5 encoder" or "t5 decoder"."""


@dataclass(frozen=True)
class Stage:
    """What of a model a pipeline rank (or one chunk of it) has; everything by default."""

    first: bool = True
    last: bool = True
    virtual: int | None = None
    encoder: bool = True
    decoder: bool = True


def config_of(recipe: Recipe, **fields: Any) -> Any:
    """The TransformerConfig of a recipe, and of a layout's fields."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    activation = torch.nn.functional.silu if recipe.gated else torch.nn.functional.gelu
    return TransformerConfig(**transformer_fields(recipe) | {"activation_func": activation} | fields)


def stock_specs(block: str, config: Any, virtual: int | None) -> Any:
    """megatron-core's own local layers."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.T5 import t5_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    if block == "bert":
        return bert_layer_local_spec
    if block == "gpt":
        return get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization=config.normalization)
    layer = getattr(t5_spec, f"{block.removeprefix('t5 ')}_model_with_local_spec")()
    return TransformerBlockSubmodules(
        [layer] * (config.num_layers // config.pipeline_model_parallel_size), layer_norm=t5_spec.LNImpl
    )


def build(recipe: Recipe, config: Any, specs: Specs, stage: Stage | None = None) -> Any:
    """The model, or a stage of it, with parameters named as upstream names them."""
    stage = stage or Stage()
    ends = {"pre_process": stage.first, "post_process": stage.last}
    sizes = {"vocab_size": recipe.vocab, "max_sequence_length": recipe.seq}
    if recipe.family == "bert":
        from megatron.core.models.bert.bert_model import BertModel

        spec = specs("bert", config, stage.virtual)
        tied = {"share_embeddings_and_output_weights": True, "add_binary_head": False, "vp_stage": stage.virtual}
        return BertModel(config, 0, spec, **sizes, **ends, **tied)
    if recipe.family == "t5":
        from megatron.core.models.T5 import T5Model

        blocks = [specs(f"t5 {side}", config, stage.virtual) for side in ("encoder", "decoder")]
        halves = {"add_encoder": stage.encoder, "add_decoder": stage.decoder}
        return T5Model(config, config, *blocks, **sizes, **ends, **halves, share_embeddings_and_output_weights=True)
    from megatron.core.models.gpt import GPTModel

    return GPTModel(
        config,
        specs("gpt", config, stage.virtual),
        **sizes,
        **ends,
        share_embeddings_and_output_weights=not recipe.gated,
        position_embedding_type="rope" if recipe.gated else "learned_absolute",
        vp_stage=stage.virtual,
    )


def losses_of(model: Any, recipe: Recipe, batch: Batch, positions: torch.Tensor, mask: Any = None) -> Any:
    """What the model makes of a micro-batch: on a last stage each token's loss [micro_batch, tokens], else its output.

    positions  [tokens], where these tokens stand in the sequence
    mask       causal, True hides: for layers that make none themselves
    """
    import torch

    first = next(model.parameters(), None)  # a stage may have no layers
    device = torch.device("cpu") if first is None else first.device
    tokens, labels = (torch.as_tensor(x).to(device) for x in (batch.tokens, batch.labels))
    positions = positions.to(device)
    if recipe.family == "bert":
        found = model(tokens, torch.as_tensor(batch.real).to(device), lm_labels=labels)
        return found[0] if isinstance(found, tuple) else found
    if recipe.family == "t5":
        decoder = torch.as_tensor(batch.decoder).to(device)
        padding = torch.as_tensor(batch.real).to(device) == 0
        ahead = torch.ones(decoder.shape[1], decoder.shape[1], dtype=torch.bool, device=device).triu(1)
        masks = (
            padding[:, None, None, :].expand(-1, 1, tokens.shape[1], -1),
            ahead.expand(len(tokens), 1, -1, -1),
            padding[:, None, None, :].expand(-1, 1, decoder.shape[1], -1),
        )
        return model(tokens, decoder, *masks, lm_labels=labels)
    return model(tokens, positions.expand_as(tokens), mask, labels=labels)


def mean_of(losses: torch.Tensor, recipe: Recipe, batch: Batch, whole: int) -> torch.Tensor:
    """The mean over a micro-batch's `whole` tokens, of which these are some; a BERT's padding counts as loss 0."""
    import torch

    if recipe.family == "bert":
        losses = losses * torch.as_tensor(batch.real).to(losses.device)
    return losses.sum() / whole
