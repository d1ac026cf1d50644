"""A save in the background by megatron-core's persistent writer is of the moment at which it was asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from nxdt_nemo.megatron.dist_checkpointing.async_utils import schedule_async_call


class Request(NamedTuple):
    """megatron-core's AsyncRequest, what is read of it."""

    async_fn_args: tuple[Any, ...]
    preload_fn: Any


def scheduled(request: Request) -> Request:
    found: list[Request] = []
    schedule_async_call(lambda _, given: found.append(given), None, request)
    return found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_training_goes_on_in_other_memory(dtype: torch.dtype) -> None:
    tensors = [torch.full((2, 3), 1.5).to(dtype), torch.tensor(7).to(dtype), torch.empty(0, 4, dtype=dtype)]
    before = [tensor.clone() for tensor in tensors]
    bucket = ("/ckpt/__0_0.distcp", "key", (["bytes"], list(enumerate(tensors))))
    request = scheduled(Request((0, [bucket], "queue"), lambda: pytest.fail("what it stages is written")))
    for tensor in tensors:
        tensor.add_(1)

    rank, [(path, key, (texts, written))], results = request.async_fn_args
    assert (rank, path, key, texts, results) == (0, bucket[0], "key", ["bytes"], "queue")
    assert [item for item, _ in written] == [0, 1, 2] and request.preload_fn is None
    for (_, tensor), old in zip(written, before, strict=True):
        assert torch.equal(tensor, old) and tensor.dtype == dtype and tensor.is_contiguous() and tensor.is_shared()
        assert tensor.untyped_storage().nbytes() == old.nbytes  # torch.save writes all of a storage


def test_what_has_nothing_to_stage_is_left_to_upstream() -> None:
    request = Request(("anything",), None)
    assert scheduled(request) is request
