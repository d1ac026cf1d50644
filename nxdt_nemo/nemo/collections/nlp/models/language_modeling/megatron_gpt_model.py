"""NeMo's spec names, answered with this backend's layers; and interleaved pipelines where NeMo asserts against them.

Room nemo/. Stands in for nemo.collections.nlp.models.language_modeling.megatron_gpt_model.get_specs, which builds every
TransformerEngine spec before it picks one. Wraps three of that file's functions which do what they should with a list
of chunks, once they do not look for a virtual pipeline size, and one that scales the loss twice.
Proof: tests/megatron/test_specs.py, tests/nemo/test_layouts.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nxdt_nemo import console
from nxdt_nemo.errors import ConfigError
from nxdt_nemo.megatron.models.gpt.gpt_layer_specs import get_gpt_block_spec
from nxdt_nemo.megatron.models.gpt.gpt_model import virtual_stage

__all__ = ["get_forward_output_and_loss_func", "get_specs", "in_chunks", "mcore_model_customize"]

PLAIN = ("", "te_gpt", "megatron_gpt_full_te_layer_autocast")
MIXED = "decoder_block_gpt"


def get_specs(
    spec_name: str,
    transformer_config: Any = None,
    use_te: bool = True,
    hyena_cfg: dict[str, Any] | None = None,
    fp8: bool = False,
) -> Any:
    """The block spec for `model.name`. Raises ConfigError for a name that has no layers here yet."""
    if spec_name not in (*PLAIN, MIXED):
        raise ConfigError(
            f"{spec_name!r} has no layers on this backend yet",
            place="model.name",
            fix=f"use one of {', '.join(repr(name) for name in (*PLAIN, MIXED))}",
        )
    if use_te or spec_name in PLAIN[1:]:
        console.once("TransformerEngine layers are built from nxdt_nemo's own", key="te-layers")
    return get_gpt_block_spec(transformer_config, virtual_stage.get(), mixed=spec_name == MIXED)


def mcore_model_customize(upstream: Any, cfg: Any, model: Any) -> None:
    """Upstream's, for each chunk of an interleaved pipeline too; and the layers learn of ALiBi.

    megatron-core's GPTModel takes `position_embedding_type: alibi` for no positions at all.
    """
    if cfg.get("position_embedding_type") == "alibi":
        model.config.position_embedding_type = "alibi"
    with _not_interleaved(cfg):
        upstream(cfg, model)


def in_chunks(upstream: Any, self: Any) -> Any:
    """A method of MegatronGPTModel, run on a model of several chunks."""
    with _not_interleaved(self.cfg):
        return upstream(self)


@contextmanager
def _not_interleaved(cfg: Any) -> Iterator[None]:
    from omegaconf import open_dict

    key = "virtual_pipeline_model_parallel_size"
    size = cfg.get(key)
    if size is None:
        yield
        return
    with open_dict(cfg):
        cfg[key] = None
    try:
        yield
    finally:
        cfg[key] = size


def get_forward_output_and_loss_func(upstream: Any, self: Any, *args: Any, **named: Any) -> Callable[..., Any]:
    """Upstream's, with a loss that has not been multiplied by the context parallel size: the schedule does that."""
    from megatron.core import parallel_state

    step: Callable[..., Any] = upstream(self, *args, **named)
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return step

    @functools.wraps(step)
    def forward(*inputs: Any, **options: Any) -> tuple[Any, Callable[..., Any]]:
        output, loss_func = step(*inputs, **options)

        def loss_of(*found: Any, **wanted: Any) -> tuple[Any, ...]:
            loss, *rest = loss_func(*found, **wanted)
            return (loss / size, *rest)

        return output, loss_of

    return forward
