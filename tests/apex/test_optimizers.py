"""Fused optimizers against torch's own and against formulas in float64, over many steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nxdt_nemo.apex import amp_C
from nxdt_nemo.apex._kernels import adam as adam_kernels
from nxdt_nemo.apex.multi_tensor_apply import multi_tensor_applier
from nxdt_nemo.apex.optimizers import FusedAdam, FusedLAMB, FusedSGD
from nxdt_nemo.errors import NotOnNeuron

SHAPES = [(7,), (5, 3), (2, 3, 4), (1,)]
STEPS = 12
AssertWithin = Callable[..., None]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
    """The same for everyone who asks for the step."""
    generator = torch.Generator().manual_seed(100 + step)
    for shape in SHAPES:
        yield torch.randn(shape, generator=generator).to(dtype)


def train(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range = range(STEPS), scale: float = 1.0
) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], torch.Tensor):
                group["lr"] = 1e-2 * (1 + step % 3)  # as a schedule does
        for param, grad in zip(params, gradients(step, params[0].dtype), strict=True):
            param.grad = grad * scale
        optimizer.step()


@pytest.fixture(params=["one pass", "formula", "traced"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Adam's ways: torch's kernel where there is one, the formula, and what a device has that traces."""
    if request.param != "one pass":
        monkeypatch.setattr(adam_kernels, "_ONE_PASS_DEVICES", frozenset())
    if request.param == "traced":
        monkeypatch.setattr(adam_kernels, "TRACED_DEVICES", frozenset({"cpu"}))
    return str(request.param)


class Formula:
    """Adam and LAMB in float64, one tensor after the other."""

    def __init__(self, params: list[nn.Parameter], **settings: Any) -> None:
        self.values = [p.detach().double() for p in params]
        self.means = [torch.zeros_like(v) for v in self.values]
        self.squares = [torch.zeros_like(v) for v in self.values]
        self.step = 0
        self.s = {"betas": (0.9, 0.999), "eps": 1e-8, "wd": 0.0, "decoupled": True, "correct": True, **settings}

    def update(self, grads: list[torch.Tensor], lr: float) -> None:
        self.step += 1
        (b1, b2), s = self.s["betas"], self.s
        c1, c2 = (1 - b1**self.step, 1 - b2**self.step) if s["correct"] else (1.0, 1.0)
        if "clip" in s:
            norm = torch.cat([g.flatten() for g in grads]).norm()
            grads = [g / max(1.0, float(norm) / s["clip"]) for g in grads]
        for i, grad in enumerate(grads):
            p = self.values[i]
            g = grad if s["decoupled"] else grad + s["wd"] * p
            self.means[i] = b1 * self.means[i] + (1 - b1 if s.get("averaging", True) else 1) * g
            self.squares[i] = b2 * self.squares[i] + (1 - b2) * g * g
            update = (self.means[i] / c1) / ((self.squares[i] / c2).sqrt() + s["eps"])
            if s["decoupled"]:
                update = update + s["wd"] * p
            trust = 1.0
            if "clip" in s and (s["nvlamb"] or s["wd"]) and p.norm() > 0 and update.norm() > 0:
                trust = float(p.norm() / update.norm())
            self.values[i] = p - lr * trust * update

    def train(self, steps: int = STEPS) -> list[torch.Tensor]:
        for step in range(steps):
            self.update([g.double() for g in gradients(step)], 1e-2 * (1 + step % 3))
        return self.values


ADAM = [  # FusedAdam's settings, Formula's
    ({}, {}),
    ({"weight_decay": 0.1}, {"wd": 0.1}),
    ({"weight_decay": 0.1, "adam_w_mode": False}, {"wd": 0.1, "decoupled": False}),
    (
        {"betas": (0.8, 0.95), "eps": 1e-3, "bias_correction": False},
        {"betas": (0.8, 0.95), "eps": 1e-3, "correct": False},
    ),
]


@pytest.mark.parametrize(("settings", "formula"), ADAM)
def test_adam_is_the_formula(
    settings: dict[str, Any], formula: dict[str, Any], path: str, assert_within: AssertWithin
) -> None:
    params = parameters()
    reference = Formula(params, **formula)
    optimizer = FusedAdam(params, lr=1e-2, **settings)
    train(optimizer, params)
    for ours, wanted in zip(params, reference.train(), strict=True):
        assert_within(ours, wanted, 2e-6, path)
    for ours, mean, square in zip(params, reference.means, reference.squares, strict=True):
        assert_within(optimizer.state[ours]["exp_avg"], mean, 1e-6)
        assert_within(optimizer.state[ours]["exp_avg_sq"], square, 1e-6)


def test_that_check_sees_one_percent_of_a_gradient(path: str, assert_within: AssertWithin) -> None:
    params = parameters()
    wanted = Formula(params, wd=0.1).train()[1]
    optimizer = FusedAdam(params, weight_decay=0.1)
    for step in range(STEPS):
        train(optimizer, params, range(step, step + 1), scale=1.01 if step == 5 else 1.0)
    with pytest.raises(AssertionError, match="error"):
        assert_within(params[1], wanted, 2e-6)


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torch_adam(decoupled: bool, path: str, assert_within: AssertWithin) -> None:
    params, theirs = parameters(), parameters()
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, weight_decay=0.05)
    train(FusedAdam(params, weight_decay=0.05, adam_w_mode=decoupled), params, range(30))
    train(reference, theirs, range(30))
    for ours, wanted in zip(params, theirs, strict=True):
        assert_within(ours, wanted, 2e-6)


def test_adam_takes_lr_as_tensor(path: str) -> None:
    def run(as_tensor: bool) -> list[nn.Parameter]:
        params = parameters()
        optimizer = FusedAdam(params, lr=torch.tensor(0.02) if as_tensor else 0.02, weight_decay=0.1)
        for step in range(4):
            for param, grad in zip(params, gradients(step), strict=True):
                param.grad = grad
            optimizer.step()
        return params

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_adam_on_many_tensors_equals_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_kernels, "_ONE_PASS_DEVICES", frozenset())
    together, apart = parameters(), parameters()
    train(FusedAdam(together), together)
    monkeypatch.setattr(adam_kernels, "_ELEMENTS_AT_ONCE", 16)
    train(FusedAdam(apart), apart)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("limit", [1, 8, 16, 1000])
def test_runs_cover_the_list_once(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_kernels, "_ELEMENTS_AT_ONCE", limit)
    tensors = [torch.zeros(n) for n in (4, 20, 3, 3, 3, 0, 9)]
    runs = list(adam_kernels._runs(tensors))
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(7))
    for run in runs:
        assert sum(t.numel() for t in tensors[run]) <= limit or len([t for t in tensors[run] if t.numel()]) == 1


def test_adam_with_transposed_gradients_and_parameters(assert_within: AssertWithin) -> None:
    """Gradients of tied or transposed weights are not contiguous; a kernel that walks memory would mix them up."""
    start, grad = torch.randn(6, 4), torch.randn(4, 6)
    plain, turned = nn.Parameter(start.clone()), nn.Parameter(start.t().contiguous().t())
    for param in (plain, turned):
        param.grad = grad.t() if param is plain else grad.t().contiguous()
        FusedAdam([param], lr=0.1).step()
    reference = nn.Parameter(start.clone())
    reference.grad = grad.t().contiguous()
    torch.optim.AdamW([reference], lr=0.1, weight_decay=0.0).step()
    assert_within(plain, reference, 1e-6)
    assert_within(turned, reference, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adam_in_16_bits_rounds_the_float32_step(dtype: torch.dtype, path: str, assert_within: AssertWithin) -> None:
    params = parameters(dtype)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    narrow, reference = FusedAdam(params, weight_decay=0.1), torch.optim.AdamW(wide, weight_decay=0.1)
    for step in range(STEPS):
        train(narrow, params, range(step, step + 1))
        for group in reference.param_groups:
            group["lr"] = narrow.param_groups[0]["lr"]
        for param, grad in zip(wide, gradients(step, dtype), strict=True):
            param.grad = grad.float()
        reference.step()
        for ours, wanted in zip(params, wide, strict=True):
            # One rounding a step: the two ways of writing the step may round apart by one unit.
            assert_within(ours, wanted, float(torch.finfo(dtype).eps), f"step {step}")
            wanted.data.copy_(ours.detach().float())
    assert {t.dtype for state in narrow.state.values() for t in state.values()} == {torch.float32}


def test_adam_state_is_what_a_sharded_checkpoint_can_hold() -> None:
    params = parameters()
    optimizer = FusedAdam(params)
    train(optimizer, params, range(3))
    assert optimizer.param_groups[0]["step"] == 3
    for param in params:
        assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}
        assert all(t.shape == param.shape for t in optimizer.state[param].values())


OPTIMIZERS: list[tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = [
    (FusedAdam, {"weight_decay": 0.1}),
    (FusedAdam, {"capturable": True}),
    (FusedLAMB, {"weight_decay": 0.1}),
    (FusedSGD, {"lr": 0.1, "momentum": 0.9}),
]


@pytest.mark.parametrize(("cls", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise(
    cls: Callable[..., torch.optim.Optimizer], settings: dict[str, Any], dtype: torch.dtype, tmp_path: Any
) -> None:
    whole = parameters(dtype)
    optimizer = cls(whole, **settings)
    train(optimizer, whole, range(5))
    torch.save({"params": whole, "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(optimizer, whole, range(5, STEPS))

    saved = torch.load(tmp_path / "saved.pt", weights_only=False)
    resumed = [nn.Parameter(p.detach().clone()) for p in saved["params"]]
    again = cls(resumed, **settings)
    again.load_state_dict(saved["optimizer"])
    assert again.state_dict()["param_groups"] == saved["optimizer"]["param_groups"], "saved again, groups are the same"
    train(again, resumed, range(5, STEPS))
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)
        assert {k: v.dtype for k, v in optimizer.state[a].items()} == {k: v.dtype for k, v in again.state[b].items()}

    forgetful = [nn.Parameter(p.detach().clone()) for p in saved["params"]]
    train(cls(forgetful, **settings), forgetful, range(5, STEPS))
    assert not torch.equal(forgetful[0], whole[0]), "resuming without the state must show"


def test_state_dict_of_torch_shape() -> None:
    """Groups, ids and a deep copy survive, as Lightning and megatron-core expect."""
    params = parameters()
    optimizer = FusedAdam([{"params": params[:2], "wd_mult": 0.0}, {"params": params[2:], "weight_decay": 0.2}])
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    assert [g["params"] for g in state["param_groups"]] == [[0, 1], [2, 3]]
    assert [g["step"] for g in state["param_groups"]] == [2, 2]
    assert sorted(state["state"]) == [0, 1, 2, 3]
    partial = {**state, "state": {0: state["state"][0]}}
    fresh = FusedAdam([{"params": params[:2], "wd_mult": 0.0}, {"params": params[2:], "weight_decay": 0.2}])
    fresh.load_state_dict(partial)
    assert torch.equal(fresh.state[params[0]]["exp_avg"], state["state"][0]["exp_avg"])
    assert params[1] not in fresh.state


def test_adam_leaves_parameters_without_gradient() -> None:
    params = parameters()
    before = params[1].detach().clone()
    optimizer = FusedAdam(params, weight_decay=0.5)
    for param, grad in zip(params, gradients(0), strict=True):
        param.grad = grad
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)
    assert not optimizer.state.get(params[1])
    FusedAdam([{"params": []}, {"params": params}]).step()


def test_zero_grad() -> None:
    for set_none in (True, False):
        params = parameters()
        params[0].grad = torch.ones(7)
        FusedAdam(params, set_grad_none=set_none).zero_grad()
        assert (params[0].grad is None) is set_none
        assert set_none or not params[0].grad.any()
        params[0].grad = torch.ones(7)
        FusedAdam(params, set_grad_none=set_none).zero_grad(set_to_none=not set_none)
        assert (params[0].grad is None) is not set_none


def test_closure_runs_with_gradients() -> None:
    param = nn.Parameter(torch.ones(2))
    for cls in (FusedAdam, FusedLAMB, FusedSGD):
        optimizer = cls([param], lr=0.1)

        def closure() -> torch.Tensor:
            loss = (param * param).sum()
            loss.backward()
            return loss

        before = param.detach().clone()
        assert optimizer.step(closure) == (before * before).sum()
        assert not torch.equal(before, param)


def test_adam_refuses() -> None:
    params = parameters()
    with pytest.raises(RuntimeError, match="AMSGrad"):
        FusedAdam(params, amsgrad=True)
    with pytest.raises(RuntimeError, match="AMSGrad"):
        FusedLAMB(params, amsgrad=True)
    with pytest.raises(NotOnNeuron, match=r"master_weights.*megatron_amp_O2"):
        FusedAdam(params, capturable=True, master_weights=True)
    with pytest.raises(RuntimeError, match="takes no gradients"):
        FusedAdam(params).step(grads=[torch.ones(1)])  # type: ignore[arg-type]
    wide = nn.Parameter(torch.ones(2, dtype=torch.float64))
    wide.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        FusedAdam([wide]).step()
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        FusedLAMB(params, max_grad_norm=0)


def test_capturable_adam_is_adam_with_tensors(assert_within: AssertWithin) -> None:
    def run(capturable: bool) -> tuple[list[nn.Parameter], dict[str, Any]]:
        params = parameters()
        optimizer = FusedAdam(params, lr=1e-2, weight_decay=0.1, capturable=capturable)
        for step in range(STEPS):
            for param, grad in zip(params, gradients(step), strict=True):
                param.grad = grad
            optimizer.step()
        return params, optimizer.param_groups[0]

    (ours, group), (reference, _) = run(True), run(False)
    for a, b in zip(ours, reference, strict=True):
        assert_within(a, b, 2e-6)
    assert isinstance(group["lr"], torch.Tensor)
    assert group["step"].tolist() == [STEPS]


def test_capturable_adam_skips_a_step_on_overflow() -> None:
    class Scaler:
        """The two calls that Apex makes on torch's GradScaler."""

        def __init__(self, found: float) -> None:
            self.found = found

        def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, torch.Tensor]:
            return {torch.device("cpu"): torch.tensor(self.found)}

        def _get_scale_async(self) -> torch.Tensor:
            return torch.tensor(4.0)

    params, plain = parameters(), parameters()
    optimizer, reference = FusedAdam(params, capturable=True), FusedAdam(plain, capturable=True)
    for step, found in enumerate([0.0, 1.0, 0.0]):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = torch.full_like(grad, float("nan")) if found else grad * 4
        before = [p.detach().clone() for p in params]
        optimizer.step(grad_scaler=Scaler(found))
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True)) is bool(found)
        if not found:
            for param, grad in zip(plain, gradients(step), strict=True):
                param.grad = grad
            reference.step()
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))
    assert optimizer.param_groups[0]["step"].tolist() == [2]


LAMB = [
    ({}, {"wd": 0.01}),
    ({"weight_decay": 0.0}, {"wd": 0.0}),
    ({"weight_decay": 0.0, "use_nvlamb": True}, {"wd": 0.0, "nvlamb": True}),
    ({"weight_decay": 0.1, "adam_w_mode": False, "max_grad_norm": 0.5}, {"wd": 0.1, "decoupled": False, "clip": 0.5}),
    ({"grad_averaging": False, "max_grad_norm": 1e9}, {"wd": 0.01, "averaging": False, "clip": 1e9}),
]


@pytest.mark.parametrize(("settings", "formula"), LAMB)
def test_lamb_is_the_formula(settings: dict[str, Any], formula: dict[str, Any], assert_within: AssertWithin) -> None:
    params = parameters()
    reference = Formula(params, **{"eps": 1e-6, "clip": 1.0, "nvlamb": False, **formula})
    train(FusedLAMB(params, **settings), params)
    for ours, wanted in zip(params, reference.train(), strict=True):
        assert_within(ours, wanted, 3e-6)


def test_lamb_leaves_the_gradients() -> None:
    params = parameters()
    train(FusedLAMB(params), params, range(1))
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients(0), strict=True) if p.grad is not None)


SGD = [
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.2},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("settings", SGD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sgd_is_torch_sgd(settings: dict[str, Any], dtype: torch.dtype, assert_within: AssertWithin) -> None:
    params, theirs = parameters(dtype), parameters(dtype)
    train(FusedSGD(params, lr=1e-2, **settings), params)
    train(torch.optim.SGD(theirs, lr=1e-2, **settings), theirs)
    for ours, wanted in zip(params, theirs, strict=True):
        assert_within(ours, wanted, 1e-6 if dtype is torch.float32 else 2e-2)


def test_sgd_decay_after_momentum() -> None:
    param = nn.Parameter(torch.tensor([2.0]))
    optimizer = FusedSGD([param], lr=0.5, momentum=0.9, weight_decay=0.1, wd_after_momentum=True)
    value, buf = 2.0, 0.0
    for step, grad in enumerate([1.0, -2.0, 3.0]):
        param.grad = torch.tensor([grad])
        optimizer.step()
        buf = grad if step == 0 else 0.9 * buf + grad
        value -= 0.5 * (buf + 0.1 * value)
        assert param.item() == pytest.approx(value, rel=1e-6)


def test_sgd_momentum_of_a_parameter_that_joins_later() -> None:
    """Apex decides `first run` by the last parameter of the list; each must start with its own first gradient."""
    params, theirs = parameters(), parameters()
    optimizer, reference = FusedSGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for step in range(4):
        for mine, other, grad in zip(params, theirs, gradients(step), strict=True):
            late = mine is params[0] and step < 2
            mine.grad, other.grad = (None, None) if late else (grad, grad.clone())
        optimizer.step()
        reference.step()
    for ours, wanted in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}, {"nesterov": True}])
def test_sgd_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"negative|nesterov"):
        FusedSGD(parameters(), **{"lr": 0.1, **settings})


def test_kernels_as_apex_calls_them(assert_within: AssertWithin) -> None:
    """multi_tensor_adam and multi_tensor_sgd by their positional arguments, with the flag up and down."""
    flag, up = torch.zeros(1, dtype=torch.int), torch.ones(1, dtype=torch.int)
    params = parameters()
    grads, wanted = list(gradients(0)), Formula(params, wd=0.1)
    lists: list[list[Any]] = [
        grads,
        params,
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
    ]
    wanted.update([g.double() for g in grads], 1e-2)
    with torch.no_grad():
        multi_tensor_applier(amp_C.multi_tensor_adam, flag, lists, 1e-2, 0.9, 0.999, 1e-8, 1, 1, 1, 0.1)
    for ours, value in zip(params, wanted.values, strict=True):
        assert_within(ours, value, 1e-6)

    weights = [p.detach().clone() for p in params]
    copies, momenta = [w.half() for w in weights], [torch.zeros_like(w) for w in weights]
    before = [w.clone() for w in weights]
    args = (0.1, 0.9, 0.0, 1e-2, False, True, False)
    multi_tensor_applier(amp_C.multi_tensor_sgd, up, [grads, weights, momenta, copies], *args)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert not any(m.any() for m in momenta)
    multi_tensor_applier(amp_C.multi_tensor_sgd, flag, [grads, weights, momenta, copies], *args)
    for weight, old, grad, narrow in zip(weights, before, grads, copies, strict=True):
        assert_within(weight, old.double() - 1e-2 * (grad.double() + 0.1 * old.double()), 1e-6)
        assert torch.equal(narrow, weight.half())
