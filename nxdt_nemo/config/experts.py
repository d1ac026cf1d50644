"""The rules of a configuration for a mixture of experts: how tokens are routed, and what room an expert has.

Room config/ (leaf). Stands in for assertions and ValueErrors of megatron-core's that come on every rank, some of them
in the first step, and for one shape error of torch's. What each key does: docs/moe.md.
May import the standard library and nxdt_nemo.errors. Proof: tests/config/test_experts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nxdt_nemo.config.report import Change, or_list
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["CHANGES", "ERRORS"]

Errors = Iterator[ConfigError]

NUMBER = "model.num_moe_experts"
TOPK = "model.moe_router_topk"
BALANCING = "model.moe_router_load_balancing_type"
AUX = "model.moe_aux_loss_coeff"
FACTOR = "model.moe_expert_capacity_factor"
PAD = "model.moe_pad_expert_input_to_capacity"
DTYPE = "model.moe_router_dtype"
SCORE = "model.moe_router_score_function"
BOUND = "model.mcore_customization_config.moe_dropless_bound"
SHUFFLE = "model.mcore_customization_config.token_shuffle_group_size"

KNOWN: dict[str, tuple[str, ...]] = {
    BALANCING: ("aux_loss", "seq_aux_loss", "sinkhorn", "none"),
    "model.moe_token_dispatcher_type": ("alltoall", "allgather"),
    "model.moe_token_drop_policy": ("probs", "position"),
    SCORE: ("softmax", "sigmoid"),
    DTYPE: ("fp32", "fp64"),
}


def routing(view: View) -> Errors:
    """Names that megatron-core knows, and as many experts for a token as there are."""
    if (number := view.number(NUMBER)) is None:
        return
    for key, known in KNOWN.items():
        value = view.get(key)
        if value is not None and value not in known and value != "flex":  # flex becomes alltoall
            yield view.error(f"{key}={value} is not known", f"use {or_list(known)}")
    topk = view.number(TOPK, 2) or 0
    if not 1 <= topk <= number:
        yield view.error(f"{TOPK}={topk} of {NUMBER}={number}", f"use 1 to {number}")
    softmax = view.get(SCORE, "softmax") == "softmax" and view.get(BALANCING) != "sinkhorn"
    if topk == 1 and softmax and not view.get("model.moe_router_pre_softmax", False):
        yield view.error(
            f"{TOPK}=1: a softmax over one expert is always 1, and the router learns nothing",
            "use model.moe_router_pre_softmax=True",
        )
    if view.get("model.bias", True):
        yield view.error(f"model.bias=True with {NUMBER}={number}: experts have no biases", "use model.bias=False")
    if view.get("model.moe_router_enable_expert_bias", False) and softmax:
        yield view.error("model.moe_router_enable_expert_bias=True is added to sigmoids only", f"use {SCORE}=sigmoid")


def sinkhorn(view: View) -> Errors:
    """What Sinkhorn's balancing does not go with."""
    if view.number(NUMBER) is None or view.get(BALANCING) != "sinkhorn":
        return
    if view.get(AUX, 0):
        yield view.error(f"{BALANCING}=sinkhorn balances without a loss, but {AUX}={view.get(AUX)}", f"use {AUX}=0")
    if _capacity(view) is not None:
        yield view.error(f"{BALANCING}=sinkhorn drops no token, but {FACTOR}={view.get(FACTOR)}", f"use {FACTOR}=null")


def capacity(view: View) -> Errors:
    """A capacity is a number, and leaves no expert more room than there are tokens."""
    number, factor = view.number(NUMBER), _capacity(view)
    if number is None:
        return
    if factor is None:
        if view.get(PAD, False):
            yield view.error(f"{PAD}=True without {FACTOR}", f"set {FACTOR}, or {PAD}=False")
        return
    if not isinstance(factor, int | float) or not factor:
        yield view.error(f"{FACTOR}={factor} is not a factor", "use a positive number, or null to drop nothing")
    elif (topk := view.number(TOPK, 2) or 0) and factor * topk > number:
        reason = f"{FACTOR}={factor} leaves each expert room for more tokens than there are ({TOPK}={topk}, "
        yield view.error(f"{reason}{NUMBER}={number})", f"use at most {number / topk:g}, which drops nothing")


def _capacity(view: View) -> object:
    """The factor; None without one, for which megatron-core takes a negative number too."""
    factor = view.get(FACTOR)
    return None if isinstance(factor, int | float) and factor < 0 else factor


def own_keys(view: View) -> Errors:
    """This backend's own attributes of a TransformerConfig, which NeMo hands on from mcore_customization_config."""
    bound, size = view.get(BOUND), view.get(SHUFFLE, 1)
    if bound is not None and bound != "worst" and not _is_factor(bound):
        yield view.error(f"{BOUND}={bound} is not a bound", "use worst, a factor of at least 1, or null")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        yield view.error(f"{SHUFFLE}={size} is not a number of ranks", "use 1 for none")
        return
    if size > 1 and view.get(BALANCING) == "seq_aux_loss":
        yield view.error(f"{SHUFFLE}={size} mixes sequences, and {BALANCING}=seq_aux_loss balances each", "use 1")
    sizes = [view.size(f"model.{kind}_parallel_size") for kind in ("tensor_model", "pipeline_model", "context")]
    model = sizes[0] * sizes[1] * sizes[2]
    ranks = view.world_size
    if ranks is not None and ranks % model == 0 and (ranks // model) % size:
        yield view.error(f"{SHUFFLE}={size} does not divide the {ranks // model} data-parallel ranks", "use a divisor")


def _is_factor(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1


ERRORS: tuple[Callable[[View], Errors], ...] = (routing, sinkhorn, capacity, own_keys)


def router_in_float32(view: View) -> Iterator[Change]:
    """Upstream's default is the activations' dtype, whose rounding changes which experts a token goes to."""
    half = view.get("trainer.precision", view.get("model.precision")) in ("bf16", "bf16-mixed")
    if view.number(NUMBER) is not None and half and not view.has(DTYPE):
        yield Change(
            DTYPE, "null (default)", "fp32", "bf16 rounds away which expert is better; null in the file keeps it"
        )


CHANGES: tuple[Callable[[View], Iterator[Change]], ...] = (router_in_float32,)
