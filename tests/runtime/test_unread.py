"""A collective that is skipped: who reads what it would have given is seen."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nxdt_nemo.runtime.unread import counted, skippable, skipping

Tail = Callable[[Tensor, Tensor], Tensor]


double_ = skippable(SimpleNamespace(double=lambda x: x.mul_(2)), "double")  # the sum over two ranks that hold the same


class Sum(torch.autograd.Function):
    """Its gradient needs nothing of what it gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.clone()
        double_(result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
        return grads[0] * 2


def layer(x: Tensor, weight: Tensor, tail: Tail) -> Tensor:
    return tail(Sum.apply(Sum.apply(x @ weight).sigmoid() @ weight), x)  # type: ignore[no-untyped-call]


def gradients(run: Any, tail: Tail) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(1)
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with run as found:
        result = layer(x, weight, tail)
    result.sum().backward()
    return found, [one.grad for one in (x, weight) if one.grad is not None]


UNREAD: dict[str, Tail] = {
    "bias, dropout, residual": lambda y, x: F.dropout(y + 1, 0.5).add_(x),
    "residual": lambda y, x: x + y,
    "views and casts": lambda y, x: torch.cat([y.view(-1), x.flatten()]).to(torch.bfloat16),
    "rows put back": lambda y, x: torch.zeros_like(x).scatter_add_(0, torch.tensor([[1, 0, 2, 0]] * 3), y),
}
READ: dict[str, tuple[Tail, str]] = {
    "its own gradient": (lambda y, x: x + y.relu(), "aten.relu.default"),
    "another one's": (lambda y, x: x * y, "autograd"),
    "the host": (lambda y, x: x + y + float(y.detach().sum()), "aten.detach.default"),
    "a module's memory": (lambda y, x: x + y + F.dropout(KEPT.copy_(y.detach()), 0.0), "aten.detach.default"),
}
KEPT = torch.zeros(3, 4)


@pytest.mark.parametrize("name", UNREAD)
def test_what_nobody_reads_is_not_sent_and_gradients_are_the_same(name: str) -> None:
    run, plain = gradients(counted(), UNREAD[name])
    assert run.sent == 2
    skipped, found = gradients(skipping(2), UNREAD[name])
    assert skipped.read == "" and all(map(torch.equal, found, plain))


@pytest.mark.parametrize("name", READ)
def test_a_reader_is_named(name: str) -> None:
    tail, reader = READ[name]
    skipped, _ = gradients(skipping(2), tail)
    assert skipped.read == reader


def test_one_that_the_rest_is_computed_from_is_read_and_its_nan_shows() -> None:
    skipped, found = gradients(skipping(1), UNREAD["residual"])
    assert skipped.read == "aten.sigmoid.default" and found[1].isnan().any()


def test_outside_and_of_integers_all_is_sent() -> None:
    ones = torch.ones(2)
    double_(ones)
    numbers = torch.ones(2, dtype=torch.int64)
    with skipping(1) as run:
        double_(numbers)
    assert ones.tolist() == [2, 2] and numbers.tolist() == [2, 2] and run.read == ""
