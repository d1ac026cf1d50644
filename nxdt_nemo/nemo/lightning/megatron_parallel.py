"""NeMo 2.0's mean loss of a step, without asking the device which micro-batches have tokens.

Room nemo/. Wraps nemo.lightning.megatron_parallel.MaskedTokenLossReduction.reduce. Proof: tests/nemo/test_nemo2.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from nxdt_nemo.runtime.select import current

__all__ = ["reduce"]

KEY = "loss_sum_and_ub_size"


def reduce(
    original: Callable[..., torch.Tensor], self: Any, losses_reduced_per_micro_batch: Sequence[dict[str, torch.Tensor]]
) -> torch.Tensor:
    """Loss a token over the micro-batches of all data-parallel ranks, float32 [].

    losses_reduced_per_micro_batch   of each its sum and its number of tokens, float32 [2]
    On a traced lane a micro-batch without tokens counts as zeros. Upstream leaves it out, for which it reads each.
    """
    found = losses_reduced_per_micro_batch
    if not (current().traced and found and KEY in found[0]):
        return original(self, found)
    total = torch.stack([torch.where(each[KEY][1] > 0, each[KEY], 0.0) for each in found]).sum(dim=0)
    current().all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return total[0] / total[1]
