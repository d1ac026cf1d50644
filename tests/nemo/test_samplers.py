"""An EpochSampler's epochs, and where it goes on, against upstream's sampler in a run that nobody interrupts."""

from __future__ import annotations

from typing import Any

import pytest

MICRO, RANKS, PER_STEP = 2, 2, 3  # samples of a micro-batch, data-parallel ranks, micro-batches of a step
SAMPLES = MICRO * RANKS
GLOBAL = SAMPLES * PER_STEP
EPOCHS = 6


def upstream(kind: str, total: int, rank: int, consumed: int = 0) -> Any:
    from nemo.collections.nlp.data.language_modeling.megatron import data_samplers as nemo

    named = {"micro_batch_size": MICRO, "data_parallel_rank": rank, "data_parallel_size": RANKS}
    if kind == "cyclic":
        return nemo.MegatronPretrainingRandomSampler(total, consumed, **named, drop_last=True)
    return nemo.MegatronPretrainingSampler(total, consumed, **named, global_batch_size=GLOBAL)


def whole_run(kind: str, total: int, limit: int | None) -> list[list[list[list[int]]]]:
    """Steps of each epoch of upstream's own sampler, read as Lightning does: by its length, whole steps only."""
    sampler, epochs = upstream(kind, total, 1), []
    for _ in range(EPOCHS):
        batches, steps, fetched = iter(sampler), [], 0
        length = len(sampler) if limit is None else min(len(sampler), limit)
        while fetched < length:
            step = [next(batches) for _ in range(min(PER_STEP, length - fetched))]
            fetched += len(step)
            if len(step) == PER_STEP:
                steps.append(step)
        epochs.append(steps)
    return epochs


def resumed(kind: str, total: int, limit: int | None, consumed: int, epochs: int) -> list[list[list[list[int]]]]:
    """The same from a sampler that was put in place after `consumed` samples."""
    from torch.utils.data import DataLoader

    from nxdt_nemo.nemo.collections.nlp.data.language_modeling.megatron.data_samplers import put_around

    loader: Any = DataLoader(range(total), batch_sampler=upstream(kind, total, 1, consumed), collate_fn=list)
    sampler = put_around(loader, PER_STEP, limit, consumed)
    assert sampler is not None and loader.batch_sampler is sampler
    found = []
    for epoch in range(7, 7 + epochs):
        sampler.set_epoch(epoch)
        iter(loader)  # Lightning looks whether it can be iterated
        batches, fetched, steps = iter(loader), sampler.done, []
        while len(sampler) - fetched >= PER_STEP:
            steps.append([next(batches) for _ in range(PER_STEP)])
            fetched += PER_STEP
        found.append(steps)
    return found


def compare(kind: str, total: int, limit: int | None) -> tuple[int, list[int]]:
    """(number of places compared, consumed samples of those at which the resumed run reads something else)."""
    whole = whole_run(kind, total, limit)
    steps = [step for epoch in whole for step in epoch]
    wrong = []
    for done in range(len(steps)):
        found = [step for epoch in resumed(kind, total, limit, done * GLOBAL, EPOCHS) for step in epoch]
        if found[: len(steps) - done] != steps[done:]:
            wrong.append(done * GLOBAL)
    return len(steps), wrong


TOTALS = [GLOBAL * 4, GLOBAL * 4 + SAMPLES, GLOBAL * 4 + 1]
CASES = [(kind, total, limit) for kind in ("single", "cyclic") for total in TOTALS for limit in (None, 6, 9)]


@pytest.mark.parametrize(("kind", "total", "limit"), CASES)
def test_resumed_anywhere_it_reads_what_follows(active: Any, kind: str, total: int, limit: int | None) -> None:
    compared, wrong = active(compare, kind, total, limit)
    assert compared > EPOCHS
    assert wrong == []


def upstreams_own(kind: str, total: int) -> list[list[list[int]]]:
    """What upstream's sampler reads in the first two epochs when it was made in the middle of the second."""
    sampler = upstream(kind, total, 1, total + GLOBAL)
    return [list(iter(sampler)) for _ in range(2)]


def test_upstreams_sampler_has_no_data_after_an_epoch(active: Any) -> None:
    """Else the tests above prove nothing."""
    assert active(upstreams_own, "single", GLOBAL * 4) == [[], []]


def place(kind: str, consumed: int, limit: int | None) -> tuple[int, int]:
    from torch.utils.data import DataLoader

    from nxdt_nemo.nemo.collections.nlp.data.language_modeling.megatron.data_samplers import put_around

    loader: Any = DataLoader(range(GLOBAL * 4), batch_sampler=upstream(kind, GLOBAL * 4, 0, consumed))
    sampler = put_around(loader, PER_STEP, limit, consumed)
    assert sampler is not None
    return sampler.done, len(loader)


@pytest.mark.parametrize("kind", ["single", "cyclic"])
@pytest.mark.parametrize(
    ("steps", "limit", "done", "length"),
    [
        (0, None, 0, 12),
        (1, None, 3, 12),
        (3, None, 9, 12),
        (4, None, 0, 12),
        (5, None, 3, 12),
        (3, 6, 3, 6),
        (4, 6, 0, 6),
    ],
)
def test_place_and_length(active: Any, kind: str, steps: int, limit: int | None, done: int, length: int) -> None:
    assert active(place, kind, steps * GLOBAL, limit) == (done, length)


def another() -> Any:
    from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

    from nxdt_nemo.nemo.collections.nlp.data.language_modeling.megatron.data_samplers import put_around

    loader: Any = DataLoader(range(8), batch_sampler=BatchSampler(SequentialSampler(range(8)), 2, drop_last=True))
    before = loader.batch_sampler
    return put_around(loader, PER_STEP, None, 4), loader.batch_sampler is before


def test_a_sampler_of_somebody_elses_stays(active: Any) -> None:
    assert active(another) == (None, True)


def with_workers() -> list[list[int]]:
    """Workers read ahead, and the epoch ends before what they have read."""
    from torch.utils.data import DataLoader

    from nxdt_nemo.nemo.collections.nlp.data.language_modeling.megatron.data_samplers import put_around

    loader: Any = DataLoader(
        range(GLOBAL * 4),
        batch_sampler=upstream("cyclic", GLOBAL * 4, 1),
        collate_fn=list,
        num_workers=2,
        persistent_workers=True,
    )
    sampler = put_around(loader, PER_STEP, PER_STEP, 0)
    assert sampler is not None
    found = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        iter(loader)
        batches = iter(loader)
        found += [next(batches) for _ in range(PER_STEP)]
    return found


def test_what_workers_read_ahead_is_not_lost(active: Any) -> None:
    whole = active(whole_run, "cyclic", GLOBAL * 4, PER_STEP)
    assert active(with_workers) == [batch for epoch in whole[:3] for step in epoch for batch in step]
