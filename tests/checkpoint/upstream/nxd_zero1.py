"""NxD's own load_checkpoint, NeuronZero1Optimizer and save_checkpoint: `nxd_zero1.py WORK RANKS`, run by stubs.py.

WORK/ours has the checkpoint `one` of a data-parallel rank and `many` of RANKS. Each is loaded into a new optimizer, and
saved again below WORK/theirs by the name. That of one rank then makes a step with all gradients 2^-10: `stepped`.
torch_xla is the real one, on its CPU; data-parallel ranks above 0 are ones that this process says it is, and gather
from nobody.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch_xla.core.xla_model as xm
from neuronx_distributed.optimizer import NeuronZero1Optimizer
from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.trainer import checkpoint
from torch_xla import runtime
from torch_xla.distributed.zero_redundancy_optimizer import ZeroRedundancyOptimizer

work, ranks = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{work}/store", rank=0, world_size=1)
with mock.patch.object(parallel_state, "get_platform_target", return_value="trn1"):
    parallel_state.initialize_model_parallel()
checkpoint.get_local_world_size = lambda: 1  # asks for a variable by a name that torch_xla 2.9 has not


def optimizer_of(tag: str, groups: list[list[int]]) -> NeuronZero1Optimizer:
    """Zeros in place of the model's tensors, in the two groups of NxDT's get_param_groups_by_weight_decay."""
    state = torch.load(work / "ours" / tag / "model/dp_rank_00_tp_rank_00_pp_rank_00.pt")
    parameters = {
        name: torch.nn.Parameter(torch.zeros_like(value).to(xm.xla_device())) for name, value in state.items()
    }
    split: list[list[torch.nn.Parameter]] = [[], []]
    for name, parameter in parameters.items():
        split["bias" in name].append(parameter)
    given = [{"params": split[0], "weight_decay": 0.01}, {"params": split[1], "weight_decay": 0.0}]
    return NeuronZero1Optimizer(
        given,
        torch.optim.AdamW,
        lr=1e-3,
        sharding_groups=groups,
        optimizer_dtype=torch.float32,
        save_master_weights=True,
    )


def through(tag: str, rank: int, count: int) -> NeuronZero1Optimizer:
    found: Any = optimizer_of(tag, [list(range(count))])
    checkpoint.load_checkpoint(str(work / "ours"), tag, optimizer=found)
    save(tag, found)
    return found


def save(tag: str, optimizer: Any) -> None:
    checkpoint.save_checkpoint(str(work / "theirs"), tag, optimizer=optimizer, num_workers=1)


one = through("one", 0, 1)
for rank in range(ranks):
    with (
        mock.patch.object(runtime, "global_ordinal", return_value=rank),
        mock.patch.object(checkpoint, "get_data_parallel_rank", return_value=rank),
        mock.patch.object(ZeroRedundancyOptimizer, "allgather_weights_and_update_full_parameter"),
    ):
        through("many", rank, ranks)
for group in one.param_groups:
    for parameter in group["params"]:
        parameter.grad = torch.full_like(parameter, 2**-10)
one.step()
xm.mark_step()
save("stepped", one)
