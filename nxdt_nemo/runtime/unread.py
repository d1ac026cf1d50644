"""The last collective of a function that is run again for its gradients only: not sent where nobody reads it.

Room runtime/. For lanes that run operations as they are called; a traced lane leaves out by itself what nobody reads
(Lane.unread). Imports torch. Proof: tests/runtime/test_unread.py, tests/megatron/test_recompute.py, and
tests/megatron/test_communication.py.

A layer ends with the sum of its row-parallel part, a bias, dropout and the residual: the gradients of none of these
need the sum. Whether that holds is not assumed but watched: from the skipped collective on every operation is seen,
and its result holds NaN. Operations that add, scale by something else or move data pass the stand-in on; any other
one, and autograd keeping a part of it, reads it. Then the caller has to run the function again, with everything sent.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Run", "counted", "skippable", "skipping"]

aten = torch.ops.aten

PASSING = frozenset(
    (
        aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Scalar,
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default, aten.slice.Tensor,
        aten.select.int, aten.transpose.int, aten.t.default, aten.permute.default, aten.unsqueeze.default,
        aten.squeeze.dim, aten.clone.default, aten._to_copy.default, aten.alias.default, aten.sum.dim_IntList,
        aten.cat.default, aten.split.Tensor, aten.index_select.default, aten.scatter_add_.default,
        aten.scatter_add.default, aten.index_add.default, aten.native_dropout.default,
    )
)  # fmt: skip
"""Operations whose gradients are made without values of what they are given: a product of two tensors keeps the other
one's, which is seen where autograd keeps it."""
SHAPE_ONLY = frozenset(
    (aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.rand_like.default,
     aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default)
)  # fmt: skip

_runs = threading.local()  # of the collectives that are counted at present, the outermost first


class Run:
    """Collectives of one run. last: the number of the one to skip, 0 for none; read: somebody needed it."""

    def __init__(self, last: int = 0) -> None:
        self.last = last
        self.sent = 0
        self.read = ""
        self.leaving = ExitStack()

    def skip(self, result: torch.Tensor) -> None:
        """From now on `result` stands for what would have been received."""
        result.fill_(float("nan"))
        watch = _Watch(self, result)
        self.leaving.enter_context(torch.autograd.graph.saved_tensors_hooks(watch.kept, lambda tensor: tensor))
        self.leaving.enter_context(watch)


class _Watch(TorchDispatchMode):
    """Follows a tensor by its memory, and says which operation reads it."""

    def __init__(self, run: Run, result: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run
        # Storages are held, so that their addresses stay theirs: of what is computed from the result, of what is new.
        self._made: dict[int, Any] = {}
        self._new: dict[int, Any] = {}
        self._note(result, self._made)

    @staticmethod
    def _note(given: Any, where: dict[int, Any]) -> None:
        for one in tree_leaves(given):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                where[storage._cdata] = storage

    def _holds(self, one: Any) -> bool:
        return isinstance(one, torch.Tensor) and one.untyped_storage()._cdata in self._made

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._holds(tensor):
            self._run.read = self._run.read or "autograd"
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = any(map(self._holds, tree_leaves((args, kwargs))))
        if reads and func._schema.is_mutable and args[0].untyped_storage()._cdata not in self._made | self._new:
            reads, self._run.read = False, self._run.read or str(func)  # a module's memory, perhaps, which lives on
        out = func(*args, **(kwargs or {}))
        if not reads or func in SHAPE_ONLY:
            if not func._schema.is_mutable:
                self._note(out, self._new)
            return out
        if func not in PASSING:
            self._run.read = self._run.read or str(func)
        self._note(out, self._made)
        return out


@contextmanager
def _running(run: Run) -> Iterator[Run]:
    stack = _runs.__dict__.setdefault("stack", [])
    stack.append(run)
    try:
        with run.leaving:
            yield run
    finally:
        stack.remove(run)


def counted() -> Any:
    """A context in which a Run's `sent` counts collectives that could be skipped."""
    return _running(Run())


def skipping(last: int) -> Any:
    """A context in which collective number `last` is not sent; see Run.read afterwards."""
    return _running(Run(last))


def skippable(module: Any, name: str) -> Callable[..., Any]:
    """torch.distributed's collective `name`, which writes its first argument, as one that Run counts and may skip."""

    @functools.wraps(getattr(module, name))
    def call(result: torch.Tensor, *args: Any, **named: Any) -> Any:
        collective = getattr(module, name)  # others replace it while a program runs
        stack = _runs.__dict__.get("stack")
        if not stack:
            return collective(result, *args, **named)
        skip = None
        for run in stack:
            run.sent += 1
            if run.sent == run.last:
                skip = run
        waits = named.get("async_op") or any(one is True for one in args)
        if skip is None or waits or not result.is_floating_point():
            return collective(result, *args, **named)
        skip.skip(result)
        return None

    return call
