"""All ranks learn of a preemption without a word to the device.

Room nemo/. Stands in for nemo.utils.callbacks.preemption.PreemptionCallback.interrupted, which sends a device tensor
to all ranks after every step and reads it back: the host waits for the step it has just queued.
Proof: tests/lightning/test_host_reads.py, tests/nemo/test_exp_manager.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from nxdt_nemo.runtime.hosts import host_world

__all__ = ["interrupted"]


def interrupted(self: Any) -> bool:
    """Whether rank 0 has received the signal; every rank asks at the end of each step and gets the same answer.

    One byte of host memory; nothing is sent where there is one rank.
    """
    if dist.get_world_size() == 1:
        return bool(self._interrupted)
    if not hasattr(self, "_hosts"):
        # A collective call, but so is this property: all ranks come here first at the end of the same step.
        self._hosts = host_world()
    flag = torch.tensor([self._interrupted], dtype=torch.uint8)
    dist.broadcast(flag, 0, group=self._hosts)
    return bool(flag.numpy()[0])  # not Tensor.item: host memory is not worth a host read in a count of them
