"""DPO and ORPO from log-probabilities of whole answers.

Room nemo/. Stands in for trl.DPOTrainer.dpo_loss and trl.ORPOTrainer.odds_ratio_loss, which NxD Training calls. May
import torch; knows nothing of models and layouts. P pairs; of `[P, 2]` the first column is the chosen answer's.
Proof: tests/nemo/test_preference.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["Answers", "dpo", "orpo"]


@dataclass(frozen=True)
class Answers:
    """What a model says of pairs.

    sums     [P, 2]  float32: log-probability of each answer given its prompt, added up over the answer's tokens
    tokens   [P, 2]  float32: how many those are
    text     [P]     float32: log-probability of prompt and chosen answer together
    length   [P]     float32: the tokens of that
    """

    sums: Tensor
    tokens: Tensor
    text: Tensor
    length: Tensor

    @property
    def means(self) -> Tensor:
        """[P, 2]: an answer's mean over its tokens."""
        return self.sums / self.tokens.clamp(min=1)


def dpo(
    policy: Answers, reference: Tensor, beta: float, kind: Literal["sigmoid", "hinge", "ipo"]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the mean loss of the pairs, what is logged of them), scalars.

    reference  [P, 2]: the reference model's sums
    sigmoid: Rafailov et al. 2023, arXiv:2305.18290, equation 7. hinge: Zhao et al. 2023, arXiv:2305.10425. ipo: Azar et
    al. 2023, arXiv:2310.12036, equation 17, of means over tokens as trl has it.
    """
    found, held = policy.sums, reference
    if kind == "ipo":
        found, held = policy.means, reference / policy.tokens.clamp(min=1)
    ratios = found - held
    margin = ratios[:, 0] - ratios[:, 1]
    if kind == "sigmoid":
        losses = -logsigmoid(beta * margin)
    elif kind == "hinge":
        losses = torch.relu(1 - beta * margin)
    else:
        losses = (margin - 1 / (2 * beta)) ** 2
    return losses.mean(), _logged(beta * ratios, found)


def orpo(policy: Answers, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(the loss of the pairs, what is logged of them), scalars. Hong et al. 2024, arXiv:2403.07691, equations 6 and 7.

    The likelihood is of prompt and chosen answer, a mean over the tokens of all pairs, as in the paper's code and trl.
    """
    means = policy.means
    odds = means - torch.log1p(-torch.exp(means))
    log_odds = odds[:, 0] - odds[:, 1]
    ratio = logsigmoid(log_odds)
    likelihood = -policy.text.sum() / policy.length.sum().clamp(min=1)
    logged = _logged(beta * means, means) | {
        "nll_loss": likelihood,
        "log_odds_ratio": ratio.mean(),
        "log_odds_chosen": log_odds.mean(),
    }
    return likelihood - beta * ratio.mean(), {name: value.detach() for name, value in logged.items()}


def _logged(rewards: Tensor, logps: Tensor) -> dict[str, Tensor]:
    """trl's names. rewards, logps  [P, 2]"""
    rewards, logps = rewards.detach(), logps.detach()
    return {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).float().mean(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
    }
