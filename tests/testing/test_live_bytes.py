"""The two counts, on graphs whose bytes are known to the last one."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from nxdt_nemo.testing.live_bytes import LiveBytes, SavedBytes  # noqa: E402

F32 = 4


def matrix(*shape: int) -> Any:
    return torch.ones(shape, requires_grad=True)


def test_saved_is_what_the_operations_need():
    x, weight = matrix(8, 16), matrix(4, 16)
    with SavedBytes([weight]) as saved:
        y = (x @ weight.t()).exp()
    assert saved.bytes == (8 * 16 + 8 * 4) * F32  # the product's input, the exponential's result
    y.sum().backward()
    del y, x
    assert saved.bytes == 0  # and it is gone with the graph


def test_a_storage_counts_once_however_many_views_are_saved():
    x = matrix(8, 16)
    with SavedBytes() as saved:
        left, right = x.chunk(2, -1)
        y = left * right
    assert saved.bytes == 8 * 16 * F32
    assert y.shape == (8, 8)


class Wasteful(torch.autograd.Function):
    """x * 2, which needs nothing, and keeps a copy."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x.clone())
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


@pytest.mark.parametrize(("function", "kept"), [(lambda x: x * 2, 0), (Wasteful.apply, 8 * 16)])
def test_a_copy_that_is_kept_for_nothing_shows(function, kept):
    x = matrix(8, 16)
    with SavedBytes() as saved, LiveBytes() as live:
        y = function(x)
    assert saved.bytes == kept * F32
    assert live.now == (kept + y.numel()) * F32


def test_live_is_what_was_made_inside_and_is_still_there():
    outside = torch.ones(1000)
    with LiveBytes() as live:
        x = torch.zeros(10, 10)
        assert live.now == 100 * F32
        view, outside_view = x[:5].t(), outside[10:]
        outside_view.add_(1)
        assert live.now == 100 * F32
        sums = x + 1
        del x
        assert live.now == 200 * F32  # the view holds it
        del view
        assert live.now == 100 * F32
        z = torch.tensor([1.0, 2.0], dtype=torch.float64)  # made by Python, not by an operation
        assert live.now == 100 * F32 + z.nbytes
    assert (live.peak, sums.sum().item()) == (200 * F32, 100.0)


def test_the_peak_is_of_the_moment_and_begins_anew():
    with LiveBytes() as live:
        x = torch.ones(100)
        x = ((x + 1) * 2) / 3
        assert (live.now, live.peak) == (100 * F32, 300 * F32)
        live.reset_peak()
        x = x.add_(1)
        assert live.peak == 100 * F32


def test_a_storage_that_shrinks_and_grows_is_followed():
    with LiveBytes() as live:
        x = torch.ones(100)
        x.untyped_storage().resize_(0)
        assert live.now == 0
        x.untyped_storage().resize_(50 * F32)
        assert (live.now, live.peak) == (50 * F32, 100 * F32)
    x.untyped_storage().resize_(0)  # outside nobody counts
    assert live.now == 50 * F32


def test_a_backward_pass_frees_what_was_saved_for_it():
    layers = [matrix(32, 32) for _ in range(3)]
    with LiveBytes() as live:
        h = torch.ones(64, 32)
        for weight in layers:
            h = (h @ weight).tanh()
        loss = h.sum()
        del h
        forward = live.now
        loss.backward()
        del loss
    assert forward == (4 * 64 * 32 + 1) * F32  # the input, three results, the sum
    assert live.now == 3 * 32 * 32 * F32  # the gradients
