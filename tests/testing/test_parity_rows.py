"""A row's arithmetic: what counts as an error, and when a row is good."""

from __future__ import annotations

import math

import pytest

from nxdt_nemo.testing.parity import Errors, Row, errors, relative
from nxdt_nemo.testing.reference import Trained

torch = pytest.importorskip("torch")


def trained(loss: float = 2.0, norm: float = 1.0, grad: float = 4.0) -> Trained:
    return Trained([3.0, loss], [1.0, norm], {"a": torch.tensor([grad, 0.5]), "b": torch.tensor([1.0])})


def test_equal_sides_have_no_error():
    assert errors(trained(), trained()).worst == 0.0


@pytest.mark.parametrize(("changed", "field", "size"), [({"loss": 2.2}, "loss", 0.1), ({"norm": 0.5}, "norm", 0.5)])
def test_a_scalar_that_differs_is_seen(changed, field, size):
    found = errors(trained(**changed), trained())
    assert getattr(found, field) == pytest.approx(size)
    assert found.worst == pytest.approx(size)


def test_a_gradient_is_measured_by_its_largest_element_and_named():
    found = errors(trained(grad=4.4), trained())
    assert (found.where, found.grad) == ("a", pytest.approx(0.1))


def test_copies_that_differ_count():
    assert errors(trained(), trained(), copies=0.3).worst == 0.3


def test_a_gradient_that_is_missing_or_not_finite_is_infinite():
    less = trained()
    del less.grads["b"]
    assert errors(less, trained()).grad == errors(trained(), less).grad == math.inf
    assert errors(trained(grad=math.nan), trained()).grad == math.inf


@pytest.mark.parametrize("left", [[], [1.0], [1.0, math.nan]])
def test_losses_that_are_missing_or_not_finite_are_infinite(left):
    assert relative(left, [1.0, 2.0]) == math.inf


@pytest.mark.parametrize(
    ("error", "must_fail", "good", "verdict"),
    [
        (1e-7, False, True, "green"),
        (1e-5, False, False, "RED"),
        (1e-5, True, True, "red, as it must"),
        (1e-7, True, False, "green, and must not be"),
    ],
)
def test_a_negative_control_must_be_outside(error, must_fail, good, verdict):
    row = Row("gpt", "tp2", "one", 1e-6, Errors(error, 0.0, 0.0, 0.0, "a"), must_fail)
    assert (row.good, row.verdict) == (good, verdict)
