"""`neuron.alignment`: how a model is aligned with preferences. Typed and checked; training with it is not here yet.

Room config/ (leaf). NeMo 2.4's YAML models have no such section: the names are those of NxD Training's
`model_alignment_strategy`. May import pydantic. Proof: tests/config/test_neuron.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Alignment", "Dpo", "Orpo", "Sft"]

Positive = Annotated[float, Field(gt=0.0, strict=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Sft(_Section):
    """Supervised fine-tuning. packing: several examples in a sequence."""

    packing: bool = False


class Dpo(_Section):
    """Direct preference optimization: Rafailov et al. 2023, arXiv:2305.18290.

    kl_beta     the paper's beta
    max_prompt_length          tokens of a prompt, the rest goes to the answer
    precompute_ref_log_probs   the reference model runs once, before training
    truncation_mode            which end of a prompt that is too long stays
    """

    kl_beta: Positive = 0.01
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    max_prompt_length: Annotated[int, Field(ge=1)] = 2048
    precompute_ref_log_probs: bool = True
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"


class Orpo(_Section):
    """Odds ratio preference optimization: Hong et al. 2024, arXiv:2403.07691. beta is the paper's lambda."""

    beta: Positive = 0.1
    max_prompt_length: Annotated[int, Field(ge=1)] = 2048
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"


class Alignment(_Section):
    """One of the methods, with its settings."""

    sft: Sft | None = None
    dpo: Dpo | None = None
    orpo: Orpo | None = None

    @model_validator(mode="after")
    def _one(self) -> Alignment:
        if self.dpo is not None and self.orpo is not None:
            raise ValueError("dpo and orpo are two methods, use one of them")
        return self

    @property
    def pending(self) -> str:
        """The method that this release checks and does not train; "" if there is none."""
        return "dpo" if self.dpo is not None else "orpo" if self.orpo is not None else ""
