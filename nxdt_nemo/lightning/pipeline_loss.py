"""The loss of a pipeline's last stage, brought to where NeMo logs it by all ranks of a stage alike.

Room lightning/. Beside what MegatronGPTModel (NeMo 1) and nemo.lightning.MegatronStrategy (2.0) do in their
training_step under `log_train_loss`: one rank of the last stage sends the step's loss to rank 0, so that on a traced
lane these two would have programs of their own, which are two more to compile. Imports Megatron once NeMo has set that
flag. Proof: tests/audit/test_audit.py, tests/nemo/test_xla.py, tests/nemo/test_nemo2.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["training_step"]

FLAG = "log_train_loss"


def training_step(step: Callable[..., Any], strategy: Any, *args: Any, **kwargs: Any) -> Any:
    """What `step(*args, **kwargs)` returns: the loss, float32 [], or a dict with it.

    step   upstream's of this strategy; where it would send and log the loss, this does so in its place, at its end
    NeMo 1 logs the loss of the world's last rank, this rank 0's own pipeline's: one number where the loss is averaged
    over data-parallel ranks, as all of NeMo's are.
    Before, stages but the last have a loss of 0; after, so have only those between first and last.
    """
    module = strategy.lightning_module
    owner = next((one for one in (strategy, module) if getattr(one, FLAG, False)), None)
    if owner is None or not _in_stages():
        return step(*args, **kwargs)
    with _put_off(owner) as asked:
        found = step(*args, **kwargs)
    if asked.before:
        loss = found["loss"] if isinstance(found, dict) else found
        _to_first_stage(loss)
        # NeMo 2.0 has all ranks log: its checkpoints look for the value on each.
        module.log("reduced_train_loss", loss, prog_bar=True, rank_zero_only=owner is module, batch_size=1)
    return found


class _No:
    """A flag that says no, and whether anybody has asked: a model with a step of its own may do without."""

    before = False

    def __bool__(self) -> bool:
        self.before = True
        return False


@contextmanager
def _put_off(owner: Any) -> Iterator[_No]:
    answer, given = _No(), getattr(owner, FLAG)
    setattr(owner, FLAG, answer)
    try:
        yield answer
    finally:
        setattr(owner, FLAG, given)


def _in_stages() -> bool:
    from megatron.core import parallel_state

    stages: int = parallel_state.get_pipeline_model_parallel_world_size()
    return stages > 1


def _to_first_stage(loss: torch.Tensor) -> None:
    """Each pipeline's, since all have the same: averaged over data and context, equal on tensor-parallel ranks."""
    from megatron.core import parallel_state

    group, rank = parallel_state.get_pipeline_model_parallel_group(), dist.get_rank()
    first = parallel_state.get_pipeline_model_parallel_first_rank()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    if rank == last:
        dist.send(loss, first, group)
    elif rank == first:
        dist.recv(loss, last, group)
