"""amp_C's functions, called as NeMo and megatron-core call them, against float64 formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from nxdt_nemo.apex import amp_C
from nxdt_nemo.apex._kernels import scale_norm
from nxdt_nemo.apex.multi_tensor_apply import MultiTensorApply, multi_tensor_applier

SHAPES = [(3,), (4, 5), (1,), (2, 3, 4), ()]
AssertWithin = Callable[..., None]


def some(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.Tensor]:
    return [(torch.randn(shape) * scale).to(dtype) for shape in SHAPES]


def flag(shape: tuple[int, ...] = (1,)) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int)


def norm64(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def test_the_applier_passes_chunk_size_first() -> None:
    assert multi_tensor_applier.available
    seen = MultiTensorApply(7)(lambda *args: args, flag(), [[]], 1, "x")
    assert (seen[0], seen[2:]) == (7, ([[]], 1, "x"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_l2norm(dtype: torch.dtype, per_tensor: bool, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if traced:
        monkeypatch.setattr(scale_norm, "TRACED_DEVICES", frozenset({"cpu"}))
    tensors, overflow = some(dtype), flag(())
    total, each = multi_tensor_applier(amp_C.multi_tensor_l2norm, overflow, [tensors], per_tensor)
    assert (total.dtype, total.shape, overflow.item()) == (torch.float32, (1,), 0)
    assert total.item() == pytest.approx(norm64(tensors), rel=1e-6)
    assert each.tolist() == pytest.approx([norm64([t]) for t in tensors] if per_tensor else [], rel=1e-6)


def test_l2norm_of_bf16_is_not_rounded_to_bf16() -> None:
    tensors = [torch.full((1000,), 0.1).bfloat16()]
    total, _ = multi_tensor_applier(amp_C.multi_tensor_l2norm, flag(), [tensors], False)
    assert total.item() == pytest.approx(norm64(tensors), rel=1e-6)
    assert total.bfloat16().item() != pytest.approx(norm64(tensors), rel=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_not_finite_raises_the_flag(bad: float) -> None:
    for where in range(2):
        tensors, overflow = [torch.ones(3), torch.ones(2, 2)], flag()
        tensors[where].view(-1)[-1] = bad
        multi_tensor_applier(amp_C.multi_tensor_l2norm, overflow, [tensors], False)
        assert overflow.item() == 1
        overflow.zero_()
        multi_tensor_applier(amp_C.multi_tensor_scale, overflow, [tensors, tensors], 0.5)
        assert overflow.item() == 1
        multi_tensor_applier(amp_C.multi_tensor_scale, overflow, [[torch.ones(1)], [torch.ones(1)]], 0.5)
        assert overflow.item() == 1, "a clean list must not lower the flag"


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_scale(source: torch.dtype, target: torch.dtype, scale: float) -> None:
    ins, overflow = some(source), flag()
    outs = [torch.full_like(t, 9.0, dtype=target) for t in ins]
    multi_tensor_applier(amp_C.multi_tensor_scale, overflow, [ins, outs], scale)
    for a, b in zip(ins, outs, strict=True):
        assert torch.equal(b, (a.float() * scale).to(target))
    assert overflow.item() == 0


def test_scale_in_place_as_clipping_does() -> None:
    grads = some()
    wanted = [g * 0.25 for g in grads]
    multi_tensor_applier(amp_C.multi_tensor_scale, flag(), [grads, grads], 0.25)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    multi_tensor_applier(amp_C.multi_tensor_scale, flag(), [grads, [g.detach() for g in grads]], 4.0)
    assert all(torch.equal(a, b * 4) for a, b in zip(grads, wanted, strict=True))


def test_scale_of_overlapping_but_different_tensors() -> None:
    storage = torch.arange(4.0)
    multi_tensor_applier(amp_C.multi_tensor_scale, flag(), [[storage[:2]], [storage[2:]]], 10.0)
    assert storage.tolist() == [0.0, 1.0, 0.0, 10.0]


def test_empty_lists_and_tensors() -> None:
    multi_tensor_applier(amp_C.multi_tensor_scale, flag(), [[], []], 2.0)
    empty, one = torch.zeros(0), torch.ones(2)
    multi_tensor_applier(amp_C.multi_tensor_scale, flag(), [[empty, one], [empty, one]], 2.0)
    assert one.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("check", "raised"), [(-1, 1), (0, 0), (1, 1)])
def test_axpby(dtype: torch.dtype, check: int, raised: int, assert_within: AssertWithin) -> None:
    xs, ys = some(dtype), some(dtype)
    outs = [torch.empty_like(x) for x in xs]
    overflow = flag()
    multi_tensor_applier(amp_C.multi_tensor_axpby, overflow, [xs, ys, outs], 2.0, -0.5, check)
    assert overflow.item() == 0
    for x, y, out in zip(xs, ys, outs, strict=True):
        assert_within(out, 2 * x.double() - 0.5 * y.double(), 1e-6 if dtype is torch.float32 else 4e-3)
    ys[0][0] = float("nan")
    multi_tensor_applier(amp_C.multi_tensor_axpby, overflow, [xs, ys, outs], 2.0, -0.5, check)
    assert overflow.item() == raised


def test_unscale_l2norm_leaves_the_tensors() -> None:
    tensors = some()
    before = [t.clone() for t in tensors]
    total, each = multi_tensor_applier(
        amp_C.multi_tensor_unscale_l2norm, flag(), [tensors], torch.tensor([0.125]), True
    )
    assert total.item() == pytest.approx(norm64(tensors) / 8, rel=1e-6)
    assert each[1].item() == pytest.approx(norm64([tensors[1]]) / 8, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_l2norm_scale_writes_and_measures_the_scaled_values() -> None:
    tensors = some(torch.bfloat16)
    outs = [torch.empty_like(t, dtype=torch.float32) for t in tensors]
    total, each = multi_tensor_applier(amp_C.multi_tensor_l2norm_scale, flag(), [tensors, outs], 3.0, True)
    assert total.item() == pytest.approx(3 * norm64(tensors), rel=1e-6)
    assert each[0].item() == pytest.approx(3 * norm64([tensors[0]]), rel=1e-6)
    assert all(torch.equal(o, t.float() * 3) for o, t in zip(outs, tensors, strict=True))


class PlainScaler:
    """The rule with if and else, on numbers."""

    def __init__(self, scale: float, interval: int, hysteresis: int) -> None:
        self.scale, self.growth, self.lives = scale, 0, hysteresis
        self.interval, self.hysteresis = interval, hysteresis

    def update(self, overflow: bool) -> None:
        if overflow:
            self.lives -= 1
            self.growth = 0
            if self.lives <= 0:
                self.scale *= 0.5
            return
        self.lives = self.hysteresis
        self.growth += 1
        if self.growth == self.interval:
            self.growth = 0
            if self.scale * 2 <= torch.finfo(torch.float32).max:
                self.scale *= 2


@pytest.mark.parametrize("scale", [1024.0, 2.0**127])
@pytest.mark.parametrize(("interval", "hysteresis"), [(3, 2), (1, 1), (2, 3)])
def test_update_scale_hysteresis(scale: float, interval: int, hysteresis: int) -> None:
    plain = PlainScaler(scale, interval, hysteresis)
    current, growth = torch.tensor(scale), torch.tensor(0, dtype=torch.int32)
    lives = torch.tensor([hysteresis], dtype=torch.int32)
    overflows = [False, False, False, True, True, False, True, True, True, True, False, False, False, False, True]
    for overflow in overflows * 2:
        plain.update(overflow)
        found = torch.tensor([float(overflow)])
        result = amp_C.update_scale_hysteresis(current, growth, lives, found, 2.0, 0.5, interval, hysteresis)
        assert result is current
        assert (current.item(), growth.item(), lives.item()) == (plain.scale, plain.growth, plain.lives)
