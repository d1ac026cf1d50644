"""Where in an epoch a run stands, for a run that was resumed.

Room nemo/. Stands around a sampler of nemo.collections.nlp.data.language_modeling.megatron.data_samplers in the
training dataloader; the strategy puts it there. Upstream's samplers begin each epoch at the samples consumed before
the process started, and count as an epoch what was left then, so that a resumed run ends its epoch early, feeds data
twice, or has none after its first epoch. Proof: tests/nemo/test_samplers.py, tests/nemo/test_resume.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo.collections.nlp.data.language_modeling.megatron.data_samplers import (
    BaseMegatronSampler,
    MegatronPretrainingRandomSampler,
)
from torch.utils.data import DataLoader

from nxdt_nemo.lightning.samplers import put_in_place

__all__ = ["EpochSampler", "put_around"]


class EpochSampler:
    """A batch sampler whose epochs are those of the run that was never interrupted.

    sampler        upstream's; dataloader_type `single` reads the data from its start in each epoch, `cyclic` goes on
                   through permutations of it
    micro_batches  of a step on this rank
    limit          trainer.limit_train_batches in micro-batches; None: all of the data is an epoch
    Iterating yields the indices of one micro-batch, as `sampler` does. Workers that read ahead change nothing.
    """

    def __init__(self, sampler: Any, micro_batches: int, limit: int | None = None) -> None:
        self._sampler, self._micro_batches, self._limit = sampler, micro_batches, limit
        self._samples = int(sampler.micro_batch_times_data_parallel_size)
        self._cyclic = isinstance(sampler, MegatronPretrainingRandomSampler)
        self._start = 0  # the epoch's first sample, counted through all permutations
        self._epoch: int | None = None
        self.done = 0  # micro-batches of this epoch before the first that is yielded

    @property
    def sampler(self) -> EpochSampler:
        """Lightning announces an epoch to a batch sampler's sampler: set_epoch."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_sampler"], name)

    def seek(self, consumed: int) -> None:
        """Stand where a run stands that has trained on `consumed` samples."""
        self._start, left = 0, consumed // self._samples
        if self._permutation < self._micro_batches:
            return
        while self._cyclic and left >= self._trained():
            left -= self._trained()
            self._start += len(self) * self._samples
        self.done = left % self._trained()

    def set_epoch(self, epoch: int) -> None:
        """Lightning's epoch begins: the first that is announced has been sought, others follow it."""
        if self._epoch is not None and epoch > self._epoch:
            self._start += len(self) * self._samples if self._cyclic else 0
            self.done = 0
        self._epoch = epoch

    @property
    def _permutation(self) -> int:
        """Micro-batches of all of the data."""
        return int(self._sampler.total_samples // self._samples)

    def _trained(self) -> int:
        """Micro-batches of the epoch that make whole steps; of what is left over upstream makes none."""
        return len(self) // self._micro_batches * self._micro_batches

    def __len__(self) -> int:
        """Micro-batches of the whole epoch."""
        if self._cyclic:
            whole = self._permutation - self._start // self._samples % self._permutation
        else:
            at, self._sampler.consumed_samples = self._sampler.consumed_samples, 0
            whole = len(self._sampler)
            self._sampler.consumed_samples = at
        return whole if self._limit is None else min(whole, self._limit)

    def __iter__(self) -> Iterator[list[int]]:
        self._sampler.consumed_samples = self._start + self.done * self._samples
        yield from self._sampler


def put_around(loader: DataLoader[Any], micro_batches: int, limit: int | None, consumed: int) -> EpochSampler | None:
    """Put an EpochSampler in the place of a dataloader's batch sampler; None if that is not a sampler of Megatron's."""
    sampler: Any = loader.batch_sampler
    if not isinstance(sampler, BaseMegatronSampler):
        return None
    placed = EpochSampler(sampler, micro_batches, limit)
    placed.seek(consumed)
    put_in_place(loader, placed)
    return placed
