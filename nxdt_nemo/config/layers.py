"""The rules of a configuration for what a layer is made of: its positions, and what of it is computed again.

Room config/ (leaf). Stands in for ValueErrors and an IndexError of megatron-core's that come on every rank, and for a
model that silently has no positions. May import the standard library and nxdt_nemo.errors.
Proof: tests/config/test_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nxdt_nemo.config.report import or_list
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["ERRORS"]

Errors = Iterator[ConfigError]

POSITION = "model.position_embedding_type"
# megatron.core.models.gpt.GPTModel's, less one of images and text, and with one of ours.
POSITIONS = ("learned_absolute", "rope", "none", "alibi")
# Of NeMo's legacy models. megatron-core's GPTModel takes any name, and adds nothing for one that it does not know.
LEGACY = ("kerple", "xpos", "sandwich", "relative")

GRANULARITY = "model.activations_checkpoint_granularity"
METHOD = "model.activations_checkpoint_method"
COUNT = "model.activations_checkpoint_num_layers"
MODULES = "model.recompute_modules"
PARTS = ("core_attn", "mlp", "moe", "moe_act", "layernorm", "mla_up_proj")


def positions(view: View) -> Errors:
    """Positions that megatron-core's GPT knows."""
    value = view.get(POSITION)
    if not view.get("model.mcore_gpt", False) or value is None or value in POSITIONS:
        return
    reason = "is of NeMo's legacy models" if value in LEGACY else "is not a kind of position embedding"
    yield view.error(
        f"{POSITION}={value} {reason}; megatron-core would train without positions", f"use {or_list(POSITIONS)}"
    )


def alibi(view: View) -> Errors:
    """ALiBi is computed on whole sequences."""
    if view.get(POSITION) != "alibi":
        return
    if view.size("model.context_parallel_size") > 1:
        yield view.error(f"{POSITION}=alibi needs whole sequences", "use model.context_parallel_size=1")


def recomputation(view: View) -> Errors:
    """Names and numbers of activation checkpointing fit together."""
    granularity, method, count = view.get(GRANULARITY), view.get(METHOD), view.get(COUNT)
    if granularity is None:
        return
    if granularity not in ("selective", "full"):
        yield view.error(f"{GRANULARITY}={granularity} is not known", "use selective, full or null")
    elif method is not None and method not in ("uniform", "block"):
        yield view.error(f"{METHOD}={method} is not known", "use uniform, block or null")
    elif granularity == "selective" and count is not None:
        yield view.error(f"{GRANULARITY}=selective recomputes a part of every layer, but {COUNT}={count}", "use null")
    elif granularity == "full" and method is None:
        yield view.error(f"{GRANULARITY}=full needs a method", f"use {METHOD}=uniform or {METHOD}=block")
    elif granularity == "full" and not view.number(COUNT):
        yield view.error(f"{GRANULARITY}=full needs a number of layers", f"use {COUNT}=1")
    elif granularity == "full" and method == "uniform":
        yield from _whole_chunks(view)


def recomputed_parts(view: View) -> Errors:
    """Names of what selective checkpointing computes again."""
    asked = view.get(MODULES)
    if view.get(GRANULARITY) != "selective" or asked is None:
        return
    if not isinstance(asked, list):
        yield view.error(f"{MODULES}={asked} is not a list", f"use [{asked}]")
        return
    for name in (name for name in asked if name not in PARTS):
        yield view.error(f"{MODULES}: {name} is not known", f"use {or_list(PARTS)}")
    if "moe_act" in asked and not view.get("model.moe_grouped_gemm", False):
        yield view.error(f"{MODULES}: moe_act is a part of grouped experts", "use model.moe_grouped_gemm=True")
    if "mla_up_proj" in asked and not view.get("model.multi_latent_attention", False):
        yield view.error(f"{MODULES}: mla_up_proj is a part of latent attention", "leave it out")


def _whole_chunks(view: View) -> Errors:
    """megatron-core runs past a stage's last layer in a chunk that is not full."""
    layers, stages, count = (
        view.number("model.num_layers"),
        view.size("model.pipeline_model_parallel_size"),
        view.size(COUNT),
    )
    if layers and layers % stages == 0 and (layers // stages) % count:
        own = layers // stages
        fits = or_list(part for part in range(1, own + 1) if own % part == 0)
        yield view.error(
            f"{METHOD}=uniform: {COUNT}={count} does not divide the {own} layers of a stage", f"use {fits}"
        )


ERRORS: tuple[Callable[[View], Errors], ...] = (positions, alibi, recomputation, recomputed_parts)
