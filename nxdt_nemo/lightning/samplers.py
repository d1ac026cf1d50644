"""A dataloader that begins its next epoch in the middle, and draws from streams of its own.

Room lightning/. Around the batch sampler of a plain torch dataloader; Lightning itself reads an epoch that was stopped
from its start again, and torch draws order and workers' seeds from the stream of dropout. NeMo's samplers count for
themselves (nemo/.../data_samplers.py). Proof: tests/lightning/test_megatron_strategy.py, test_strategy.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader

from nxdt_nemo.errors import ConfigError

__all__ = ["SkippingSampler", "give_streams", "put_in_place", "skip"]


class SkippingSampler:
    """A batch sampler whose first epoch is without its first `batches`; as long as the whole all the same."""

    def __init__(self, inner: Any, batches: int) -> None:
        self._inner, self._skipped = inner, batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        skipped, self._skipped = self._skipped, 0
        yield from islice(self._inner, skipped, None)


def skip(loader: Any, batches: int) -> None:
    """Let a dataloader's next epoch begin after `batches`. Raises ConfigError for one without a batch sampler."""
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        reason = f"{type(loader).__name__} cannot begin an epoch in the middle"
        raise ConfigError(reason, place="train_dataloader", fix="use a DataLoader over a dataset with a length")
    put_in_place(loader, SkippingSampler(loader.batch_sampler, batches))
    loader._iterator = None  # persistent workers' iterator would keep the sampler that it began with


def put_in_place(loader: DataLoader[Any], batch_sampler: Any) -> None:
    """Exchange a dataloader's batch sampler. DataLoader forbids it, since workers could be running."""
    object.__setattr__(loader, "batch_sampler", batch_sampler)


def give_streams(loader: object, seed: int, rank: int) -> None:
    """Let a torch dataloader draw its order and its workers' seeds from `seed` and the data-parallel `rank`.

    Where the user has given a generator, or a worker_init_fn, that stays. The order of an epoch is that of its number,
    which Lightning tells samplers by set_epoch.
    """
    if not isinstance(loader, DataLoader):
        return
    if loader.generator is None:
        loader.generator = torch.Generator().manual_seed(seed + rank)
    if loader.worker_init_fn is None:
        loader.worker_init_fn = partial(pl_worker_init_function, rank=rank)
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if hasattr(sampler, "generator") and sampler.generator is None:
        sampler.generator = order = torch.Generator()
        sampler.set_epoch = lambda epoch: order.manual_seed(hash((seed, rank, epoch)))
        sampler.set_epoch(0)
