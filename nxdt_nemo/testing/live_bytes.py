"""Bytes of tensors: what autograd keeps for the backward pass, and what is alive at any moment.

Room testing/. Counts storages, each once however many views it has; asks no allocator and no operating system, so that
a count is the same on every machine. What a kernel allocates and frees within one operation is not seen.
Proof: tests/testing/test_live_bytes.py. Used by nxdt_nemo.testing.memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "SavedBytes"]


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Inside the block: `bytes` of the storages that autograd has saved and that are still there.

    excluded   parameters, say: tensors whose storages do not count
    Tensors that a function hangs on its context without save_for_backward are not seen; LiveBytes sees them.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __enter__(self) -> SavedBytes:  # type: ignore[override]
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        """Now."""
        return sum(storage.nbytes() for ref in self._storages.values() if (storage := ref()) is not None)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._storages[storage._cdata] = weakref.ref(storage)
        return tensor


class LiveBytes(TorchDispatchMode):
    """Inside the block: `now`, the bytes of all storages that operations in it have made, and `peak`, their maximum.

    Storages that were there before do not count, even if an operation writes to them or returns a view. Of this thread:
    on the CPU a backward pass runs in it. Operations of other threads are not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # by address of the storage; 0 for one that does not count
        self._refs: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._resize: Callable[..., Any] = torch.UntypedStorage.resize_

    def reset_peak(self) -> None:
        """Let the maximum begin anew."""
        self.peak = self.now

    def __enter__(self) -> LiveBytes:
        # Storage.resize_, by which recomputed outputs are dropped and put back, is no operation that a mode sees.
        resize = self._resize

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._look(storage)
            return result

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, where)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.ops.aten.lift_fresh.default:  # what torch.tensor has just made
            for tensor in _tensors((args, kwargs)):
                self._begin(tensor.untyped_storage(), counts=False)
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            self._begin(storage, counts=True)
            self._look(storage)
        return result

    def _begin(self, storage: torch.UntypedStorage, counts: bool) -> None:
        """Watch a storage that is seen for the first time."""
        place = storage._cdata
        if place in self._refs:
            return
        self._refs[place] = weakref.ref(storage, partial(self._freed, place))
        if counts:
            self._sizes[place] = 0

    def _look(self, storage: torch.UntypedStorage) -> None:
        """Take a storage's size, which may have changed."""
        place, size = storage._cdata, storage.nbytes()
        if place in self._sizes:
            self.now += size - self._sizes[place]
            self._sizes[place] = size
            self.peak = max(self.peak, self.now)

    def _freed(self, place: int, _: Any) -> None:
        del self._refs[place]
        self.now -= self._sizes.pop(place, 0)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.device.type != "meta"]
