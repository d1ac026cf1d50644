"""NeMo's spec names, answered with this backend's layers.

Room nemo/. Stands in for nemo.collections.nlp.models.language_modeling.megatron_gpt_model.get_specs, which
builds every TransformerEngine spec before it picks one. Proof: tests/megatron/test_specs.py.
"""

from __future__ import annotations

from typing import Any

from nxdt_nemo import console
from nxdt_nemo.errors import ConfigError
from nxdt_nemo.megatron.models.gpt.gpt_layer_specs import get_gpt_block_spec

__all__ = ["get_specs"]

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
    return get_gpt_block_spec(transformer_config, mixed=spec_name == MIXED)
