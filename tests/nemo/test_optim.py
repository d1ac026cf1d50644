"""The O2 optimizer against plain fp32 AdamW, against upstream's own class, and over two data-parallel ranks."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdt_nemo.config.checks import OPTIMIZERS, SCHEDULES, UNSAVED
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV

pytestmark = pytest.mark.ranks

BATCHES, STEPS = 2, 4
Data = list[list[torch.Tensor]]


@pytest.fixture
def ranks(gloo) -> Callable[..., list[Any]]:
    """ranks(world, function, *args): the results, from processes in which the backend is active."""
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    return lambda world, function, *args: gloo(world, function, *args, init=ACTIVE, env=ACTIVE_ENV)


def data(rank: int = 0) -> Data:
    """Micro-batches by step."""
    generator = torch.Generator().manual_seed(10 + rank)
    return [[torch.randn(8, 6, generator=generator) for _ in range(BATCHES)] for _ in range(STEPS)]


class Net(torch.nn.Module):
    """Two layers in bf16 and a scale in fp32, all in one parameter group."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).bfloat16()
        self.scale = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((self.layers(x.bfloat16()).float() * self.scale - x[:, :2].sin()) ** 2).mean() * 10


def groups() -> None:
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def ours(net: Net, **options: Any) -> Any:
    from nxdt_nemo.nemo.core.optim.optimizer_with_main_params import MainParamsOptimizerWrapper

    groups()
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    return MainParamsOptimizerWrapper(inner, fp32_grad_accum=True, contiguous_grad_bucket=True, **options)


def upstreams(net: Net) -> Any:
    """NeMo's class, with the type strings of CPU tensors; its source is read and executed where it is."""
    from nxdt_nemo._activation import views

    groups()
    name = "nemo.core.optim.original_of_main_params"
    if name not in sys.modules:
        places = importlib.util.find_spec("nemo").submodule_search_locations
        file = Path(places[0]) / "core/optim/optimizer_with_main_params.py"
        module = sys.modules[name] = type(sys)(name)
        vars(module)["__builtins__"] = views().builtins_for("upstream")
        exec(compile(file.read_text().replace("'torch.cuda.", "'torch."), str(file), "exec"), vars(module))
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    kind = sys.modules[name].MainParamsOptimizerWrapper
    return kind(inner, fp32_grad_accum=True, contiguous_grad_bucket=True)


def backward(net: Net, optimizer: Any, batches: list[torch.Tensor]) -> None:
    """As NeMo's schedule: all but the last micro-batch without synchronization."""
    for batch in batches[:-1]:
        with optimizer.no_sync():
            (net(batch) / len(batches)).backward()
    (net(batches[-1]) / len(batches)).backward()


def clip(optimizer: Any, largest: float) -> float:
    parameters = optimizer.get_parameters_with_grad()
    return float(torch.nn.utils.clip_grad_norm_(parameters, largest))


def train(net: Net, optimizer: Any, batches: Data, largest: float = 0.5) -> dict[str, Any]:
    norms = []
    for step in batches:
        optimizer.zero_grad()
        backward(net, optimizer, step)
        if not getattr(optimizer, "_async", False):
            optimizer.allreduce_main_grads()
        norms.append(clip(optimizer, largest))
        optimizer.step()
    mains = [p.tolist() for group in optimizer.fp32_from_float16_groups for p in group]
    return {"norms": norms, "mains": mains, "scale": net.scale.tolist(), "halves": halves(net)}


def halves(net: Net) -> list[Any]:
    return [p.tolist() for p in net.layers.parameters()]


# --- against plain AdamW -------------------------------------------------------------------------------


def beside_plain_adamw() -> dict[str, Any]:
    """The same bf16 gradients, summed in fp32 by hand and stepped by AdamW on fp32 tensors."""
    net = Net()
    optimizer = ours(net)
    assert optimizer.fp32_grad_accumulation
    assert not optimizer.async_master_grads_allreudce
    mirror = [p.detach().clone().float().requires_grad_() for p in net.parameters()]
    plain = torch.optim.AdamW(mirror, lr=1e-2, weight_decay=0.1)
    worst, first = 0.0, [p.tolist() for p in mirror]
    for step in data():
        optimizer.zero_grad()
        for copy in mirror:
            copy.grad = torch.zeros_like(copy)
        for batch in step:
            gradients = torch.autograd.grad(net(batch), list(net.parameters()))
            for copy, gradient in zip(mirror, gradients, strict=True):
                copy.grad += gradient.float()  # type: ignore[operator]
            net(batch).backward()
        optimizer.step()
        plain.step()
        for param, copy in zip(net.parameters(), mirror, strict=True):
            main = copy if param.dtype == torch.float32 else copy.bfloat16()
            worst = max(worst, float((param.detach() - main.detach()).abs().max()))
    moved = [(torch.tensor(p) - q.detach()).abs().max().item() for p, q in zip(first, mirror, strict=True)]
    inner = optimizer.optimizer.param_groups[0]["params"]
    same = all(torch.equal(one.detach(), two.detach()) for one, two in zip(inner, mirror, strict=True))
    return {"worst": worst, "moved": min(moved), "dtypes": {str(p.dtype) for p in inner}, "same": same}


def test_equals_adamw_on_fp32_copies(ranks):
    found = ranks(1, beside_plain_adamw)[0]
    assert found["worst"] == 0.0
    assert found["moved"] > 1e-2
    assert found["dtypes"] == {"torch.float32"}
    assert found["same"]


def beside_upstream() -> list[Any]:
    found = []
    for make in (ours, upstreams):
        net = Net()
        found.append(train(net, make(net), data()))
    return found


def test_equals_upstreams_class(ranks):
    mine, theirs = ranks(1, beside_upstream)[0]
    assert mine == theirs
    assert min(mine["norms"]) > 0.5  # clipping was at work


def handed_over(first: Callable[..., Any], second: Callable[..., Any]) -> Any:
    """Train half with one class, save, load into the other in a fresh model, train the rest."""
    net = Net()
    optimizer = first(net)
    train(net, optimizer, data()[:2])
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    fresh = Net()
    taken = second(fresh)
    fresh.load_state_dict(saved["model"])
    taken.load_state_dict(saved["optimizer"])
    return sorted(saved["optimizer"]), train(fresh, taken, data()[2:])


def hand_overs() -> dict[str, Any]:
    net = Net()
    whole = train(net, ours(net), data())
    return {
        "whole": {name: value for name, value in whole.items() if name != "norms"},
        "ours": handed_over(ours, ours),
        "from upstream": handed_over(upstreams, ours),
        "to upstream": handed_over(ours, upstreams),
    }


def test_state_goes_both_ways(ranks):
    found = ranks(1, hand_overs)[0]
    whole = found.pop("whole")
    for how, (names, rest) in found.items():
        assert names == ["fp32_from_fp16_params", "optimizer"], how
        rest.pop("norms")
        assert rest == whole, how


def loading() -> list[str]:
    """What is refused; and weights that were loaded into the model alone."""
    net = Net()
    optimizer = ours(net)
    found = []
    for half in ("optimizer", "fp32_from_fp16_params"):
        state = {name: value for name, value in optimizer.state_dict().items() if name != half}
        try:
            optimizer.load_state_dict(state)
        except KeyError as error:
            found.append(str(error))
    with torch.no_grad():
        for param in net.layers.parameters():
            param.fill_(0.25)
    optimizer.reload_model_params()
    found.append(str({p.unique().item() for group in optimizer.fp32_from_float16_groups for p in group}))
    for wrong in (lambda: optimizer.step(lambda: None), lambda: type(optimizer)(optimizer.optimizer)):
        try:
            wrong()
        except ValueError as error:
            found.append(str(error))
    return found


def test_refusals_and_reloading(ranks):
    missing, other, values, closure, half = ranks(1, loading)[0]
    assert (missing, other) == ("'optimizer'", "'fp32_from_fp16_params'")
    assert values == "{0.25}"
    assert "closure" in closure
    assert "fp32 only" in half


def rounded(inner: str) -> list[tuple[bool, bool]]:
    """After each step: are the weights what stochastic rounding makes of the main parameters, and the nearest?"""
    from nxdt_nemo.apex.optimizers import FusedAdam
    from nxdt_nemo.nemo.core.optim.optimizer_with_main_params import MainParamsOptimizerWrapper
    from nxdt_nemo.nemo.core.optim.optimizers import AdamW
    from nxdt_nemo.runtime.rounding import SEED, SWITCH, stochastic

    groups()
    net, kinds = Net(), {"fused_adam": FusedAdam, "adamw": AdamW}
    optimizer = MainParamsOptimizerWrapper(kinds[inner](net.parameters(), lr=1e-2), fp32_grad_accum=True)
    found = []
    os.environ.update({SWITCH: "1", SEED: "4"})
    try:
        for step, batches in enumerate(data()[:2], start=1):
            optimizer.zero_grad()
            backward(net, optimizer, batches)
            optimizer.step()
            [mains], [halves] = optimizer.fp32_from_float16_groups, optimizer.float16_groups
            pairs = list(zip(mains, halves, strict=True))
            ours = all(torch.equal(stochastic(main, 4, step), half) for main, half in pairs)
            found.append((ours, all(torch.equal(main.bfloat16(), half) for main, half in pairs)))
    finally:
        del os.environ[SWITCH], os.environ[SEED]
    return found


@pytest.mark.parametrize("inner", ["fused_adam", "adamw"])
def test_weights_are_rounded_as_asked(ranks, inner):
    assert ranks(1, rounded, inner) == [[(True, False)] * 2]


# --- gradients -----------------------------------------------------------------------------------------


def storage() -> dict[str, Any]:
    """main_grad: one tensor for the model's life, where Megatron's own reductions find it."""
    net = Net()
    weight = net.layers[0].weight
    weight.shared, weight.allreduce, weight.sequence_parallel = True, False, True
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1
    net.layers[2].weight.requires_grad_(False)
    optimizer = ours(net)
    main = optimizer.fp32_from_float16_groups[0][0]
    before = weight.main_grad.data_ptr()
    optimizer.zero_grad()
    backward(net, optimizer, data()[0])
    found = {
        "given up": weight.grad is None,
        "filled": bool(weight.main_grad.abs().sum() > 0),
        "kind": str(weight.main_grad.dtype),
        "marks": [main.shared, main.allreduce, main.sequence_parallel, main.tensor_model_parallel, main.partition_dim],
        "frozen": hasattr(net.layers[2].weight, "main_grad"),
        "bias": hasattr(optimizer.fp32_from_float16_groups[0][1], "shared"),
    }
    weight.grad = torch.ones_like(weight)  # put there by hand, as the first pipeline stage's embedding is
    expected = weight.main_grad + 1
    optimizer.copy_model_grads_to_main_grads()
    found["by hand"] = torch.equal(weight.main_grad, expected) and weight.grad is None
    for to_none in (True, False):
        optimizer.zero_grad(to_none)
        found[f"kept {to_none}"] = weight.main_grad.data_ptr() == main.grad.data_ptr() == before
        found[f"zero {to_none}"] = bool((main.grad == 0).all()) and net.scale.grad is None
    return found


def test_main_grad(ranks):
    assert ranks(1, storage)[0] == {
        "given up": True, "filled": True, "kind": "torch.float32", "marks": [True, False, True, True, 0],
        "frozen": False, "bias": False, "by hand": True, "kept True": True, "zero True": True, "kept False": True,
        "zero False": True,
    }  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    "at once": {"async_grad_allreduce": False, "grad_div_ar_fusion": False},
    "at once, fused": {"async_grad_allreduce": False, "grad_div_ar_fusion": True},
    "async": {"async_grad_allreduce": True, "grad_div_ar_fusion": False},
    "async, fused": {"async_grad_allreduce": True, "grad_div_ar_fusion": True},
    "async, in small chunks": {"async_grad_allreduce": True, "grad_allreduce_chunk_size_mb": 1e-4},
}


def two_ranks() -> dict[str, Any]:
    """This rank's runs by variant, what one rank reaches with both ranks' data, and what no reduction would give."""
    rank = torch.distributed.get_rank()
    found = {}
    for name, options in VARIANTS.items():
        net = Net()
        found[name] = train(net, ours(net, **options), data(rank))
    net = Net()
    optimizer = ours(net)
    optimizer.allreduce_main_grads = lambda: None
    found["not reduced"] = train(net, optimizer, data(rank))
    return found


def one_rank() -> dict[str, Any]:
    net = Net()
    both = [first + second for first, second in zip(data(0), data(1), strict=True)]
    return train(net, ours(net), both)


def spread(one: Any, other: Any) -> float:
    """The largest difference of two nested lists of numbers."""
    if isinstance(one, list):
        return max(spread(a, b) for a, b in zip(one, other, strict=True))
    return abs(one - other)


def test_two_ranks(ranks):
    first, second = ranks(2, two_ranks)
    whole = ranks(1, one_rank)[0]
    for name in VARIANTS:
        assert first[name] == second[name], name
        assert first[name] == first["at once"], name  # to the bit
    # The sum of gradients in another order; a bf16 parameter may round to its neighbour in a later step.
    assert spread(first["at once"]["norms"], whole["norms"]) < 1e-2 * max(whole["norms"])
    assert spread(first["at once"]["scale"], whole["scale"]) < 1e-3
    assert spread(first["at once"]["mains"], whole["mains"]) < 2e-3
    # The control: without the reduction ranks drift apart, the fp32 parameter among them.
    assert first["not reduced"] != second["not reduced"]
    assert spread(first["not reduced"]["scale"], second["not reduced"]["scale"]) > 2e-3


def clipped() -> list[float]:
    """The norm that clipping sees, and that of the averaged gradients."""
    rank = torch.distributed.get_rank()
    found = []
    for options in (VARIANTS["async"], VARIANTS["at once"]):
        net = Net()
        optimizer = ours(net, **options)
        optimizer.zero_grad()
        backward(net, optimizer, data(rank)[0])
        if not options["async_grad_allreduce"]:
            optimizer.allreduce_main_grads()
        found.append(clip(optimizer, 1e9))
    net = Net()
    optimizer = ours(net)
    optimizer.zero_grad()
    backward(net, optimizer, data(rank)[0])
    gradients = [p.main_grad for p in net.layers.parameters()] + [net.scale.grad]
    found.append(float(torch.stack([g.norm() for g in gradients]).norm()))  # this rank's own
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)
    return [*found, float(torch.stack([(g / 2).norm() for g in gradients]).norm())]


def test_clipping_sees_reduced_gradients(ranks):
    for asynchronous, at_once, own, averaged in ranks(2, clipped):
        assert asynchronous == at_once == pytest.approx(averaged, rel=1e-6)
        assert own != pytest.approx(averaged, rel=1e-2)


def clipped_with_experts(way: str) -> tuple[float, list[float]]:
    """The norm and what becomes of the gradients of one parameter that both ranks hold, and of one expert each."""
    import torch.distributed as dist
    from nemo.collections.nlp.modules.common.megatron import clip_grads

    from nxdt_nemo.testing.ours import _model_parallel, forget_groups
    from nxdt_nemo.testing.recipe import Recipe, layout

    _model_parallel(Recipe.of("mixtral"), layout("ep2dp2"))
    try:
        dense, expert = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        expert.allreduce = False
        dense.grad, expert.grad = torch.tensor([3.0]), torch.tensor([4.0 if dist.get_rank() == 0 else 12.0])
        function = clip_grads.clip_grad_norm_fp32
        if way == "upstream's":
            function = function.__wrapped__
        norm = float(function([dense, expert], 1.0))
        return norm, [dense.grad.item(), expert.grad.item()]
    finally:
        forget_groups()


def test_all_experts_count_in_the_norm_that_clips(ranks):
    """13: the root of 9, 16 and 144. The control: upstream's ranks divide what they hold alike by 5 and by 12.4."""
    norms, grads = zip(*ranks(2, clipped_with_experts, "ours"), strict=True)
    assert norms == pytest.approx([13.0, 13.0])
    assert grads[0] == pytest.approx([3 / 13, 4 / 13]) and grads[1] == pytest.approx([3 / 13, 12 / 13])
    norms, grads = zip(*ranks(2, clipped_with_experts, "upstream's"), strict=True)
    assert norms == pytest.approx([5.0, 153**0.5])
    assert grads[0][0] != grads[1][0]


def schedulers() -> list[float]:
    """torch's schedulers and closures meet the wrapper as an optimizer."""
    net = Net()
    optimizer = ours(net)
    assert isinstance(optimizer, torch.optim.Optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    rates = []
    for step in data()[:3]:
        optimizer.zero_grad()
        backward(net, optimizer, step)
        optimizer.step()
        schedule.step()
        rates.append(optimizer.optimizer.param_groups[0]["lr"])
    return rates


def test_schedulers(ranks):
    assert ranks(1, schedulers)[0] == pytest.approx([1e-2 / 2, 1e-2 / 3, 1e-2 / 4])


def by_name() -> tuple[set[str], dict[str, bool], set[str]]:
    """NeMo's optimizers; of those that need no parallel state, whether one takes a step; NeMo's schedules."""
    from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS, get_optimizer

    moved = {}
    for name in AVAILABLE_OPTIMIZERS.keys() & set(OPTIMIZERS) - {"distributed_fused_adam", "megatron_fused_adam"}:
        weight = torch.nn.Parameter(torch.ones(3, 2))
        weight.grad = torch.full_like(weight, 0.5)
        get_optimizer(name, lr=1e-2)([weight]).step()
        moved[name] = bool((weight < 1).all())
    return set(AVAILABLE_OPTIMIZERS), moved, set(AVAILABLE_SCHEDULERS)


def test_every_name_is_nemos_or_refused(ranks):
    """mcore_distributed_optim is a name that NeMo's models know, and nobody's registry."""
    optimizers, moved, schedules = ranks(1, by_name)[0]
    assert optimizers == set(OPTIMIZERS) - {"mcore_distributed_optim"} | set(UNSAVED)
    assert len(moved) == len(OPTIMIZERS) - 3 and all(moved.values()), moved
    assert schedules == set(SCHEDULES)


def _line(optimizer_class: type, steps: int, state: dict[str, Any] | None = None) -> tuple[list[Any], dict[str, Any]]:
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    optimizer = optimizer_class([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}], lr=1e-2)
    values = []
    if state is not None:
        optimizer.load_state_dict(deepcopy(state["optimizer"]))
        for param, value in zip(params, state["params"], strict=True):
            param.data.copy_(value)
    for step in range(steps):
        for number, param in enumerate(params):
            done = 0 if state is None else 3
            param.grad = torch.full_like(param, 0.1 * (step + done + 1) * (number + 1))
        optimizer.step()
        values.append([param.detach().clone() for param in params])
    return values, {"optimizer": optimizer.state_dict(), "params": values[-1]}


TORCHS = {"adam": "Adam", "adamw": "AdamW", "adamw_fp32OptState": "AdamW", "adadelta": "Adadelta", "adamax": "Adamax",
          "adagrad": "Adagrad", "rmsprop": "RMSprop", "rprop": "Rprop"}  # fmt: skip


@pytest.mark.parametrize("name", TORCHS)
def test_an_optimizer_is_torchs_with_its_step_in_the_group(name) -> None:
    from nxdt_nemo.nemo.core.optim.optimizers import STEPPED

    assert set(STEPPED) == set(TORCHS)
    mine, torchs = STEPPED[name], getattr(torch.optim, TORCHS[name])
    ours, saved = _line(mine, 3)
    theirs, own = _line(torchs, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert [group["step"] for group in saved["optimizer"]["param_groups"]] == [3, 3]
    shapes = [parameter.shape for parameter in saved["params"]]
    for index, state in saved["optimizer"]["state"].items():
        assert state
        assert all(tensor.shape == shapes[index] for tensor in state.values())

    more, _ = _line(torchs, 2, own)
    for state in (saved, own):  # its own and torch's state: the same next steps
        resumed, _ = _line(mine, 2, state)
        torch.testing.assert_close(resumed, more, rtol=0, atol=0)
    zeros = {i: {k: torch.zeros_like(v) for k, v in x.items()} for i, x in saved["optimizer"]["state"].items()}
    fresh, _ = _line(mine, 2, {**saved, "optimizer": {**saved["optimizer"], "state": zeros}})
    assert not torch.equal(fresh[-1][0], more[-1][0])  # a lost state shows


def test_nxd_trainings_schedule() -> None:
    from nxdt_nemo.nemo.core.optim.lr_scheduler import LinearAnnealingWithWarmUp

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = LinearAnnealingWithWarmUp(optimizer, warmup_steps=2, max_steps=6)
    rates = []
    for _ in range(8):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.075, 0.05, 0.025, 0.0, 0.0])
