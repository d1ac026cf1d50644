"""A dataloader that begins its next epoch in the middle.

Room lightning/. Around the batch sampler of a plain torch dataloader; Lightning itself reads an epoch that was stopped
from its start again. NeMo's samplers count for themselves (nemo/.../data_samplers.py). Proof:
tests/lightning/test_megatron_strategy.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from nxdt_nemo.errors import ConfigError

__all__ = ["SkippingSampler", "put_in_place", "skip"]


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
