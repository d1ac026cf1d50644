"""`neuron.alignment`: how a model is aligned with preferences; megatron_alignment.py trains it.

Room config/ (leaf). NeMo 2.4's YAML models have no such section: the names are those of NxD Training's
`model_alignment_strategy`. May import pydantic. Proof: tests/config/test_neuron.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Alignment", "Dpo", "Orpo", "Sft", "prompt_length"]

Positive = Annotated[float, Field(gt=0.0, strict=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Sft(_Section):
    """Supervised fine-tuning. packing: several examples in a sequence."""

    packing: bool = False


class Dpo(_Section):
    """Direct preference optimization: Rafailov et al. 2023, arXiv:2305.18290.

    kl_beta     the paper's beta
    max_prompt_length          tokens that a prompt keeps where it and the longer answer do not fit the sequence;
                               None is 2048, as NxD Training's, or half of a shorter sequence
    precompute_ref_log_probs   the reference model runs once, before training; else in each step, its weights kept
    truncation_mode            which end of a prompt that is too long stays
    """

    kl_beta: Positive = 0.01
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    max_prompt_length: Annotated[int, Field(ge=1)] | None = None
    precompute_ref_log_probs: bool = True
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"


class Orpo(_Section):
    """Odds ratio preference optimization: Hong et al. 2024, arXiv:2403.07691. beta is the paper's lambda."""

    beta: Positive = 0.1
    max_prompt_length: Annotated[int, Field(ge=1)] | None = None
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"


def prompt_length(method: Dpo | Orpo, sequence: int) -> int:
    """max_prompt_length for sequences of so many tokens."""
    return method.max_prompt_length or min(2048, max(1, sequence // 2))


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
    def method(self) -> Dpo | Orpo | None:
        """What trains with pairs of answers; None for plain tuning."""
        return self.dpo or self.orpo
