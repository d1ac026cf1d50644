"""The xla lane on XLA:CPU, in processes of their own: device, random numbers, values read later, modules, ranks."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nxdt_nemo.runtime.xla.process_group import OPERATORS
from nxdt_nemo.testing.on_a_lane import PLACED, by_the_table, expected, placed
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.pool import RankPools, lane_here
from nxdt_nemo.testing.traced import TRACED_ENV

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def pools(with_torch_xla: None) -> Iterator[Callable[..., list[Any]]]:
    """pools(world, function, *args) on ranks whose lane is xla."""
    with RankPools() as pools:
        yield lambda world, function, *args: pools(world, function, *args, init=ACTIVE, env=TRACED_ENV, group=False)


def device() -> dict[str, Any]:
    import torch.distributed as dist

    lane = lane_here()
    figures = lane.memory()
    return {
        "type": lane.device().type,
        "name": lane.name_of_device(),
        "PJRT_DEVICE": os.environ["PJRT_DEVICE"],
        "dtypes": [lane.supports(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)],
        "memory": 0 < figures.allocated <= figures.reserved <= figures.peak <= lane.total_memory(),
        "new_group": dist.new_group.__module__,
    }


def test_the_device(pools: Callable[..., list[Any]]) -> None:
    assert pools(1, device) == [
        {
            "type": "xla",
            "name": "XLA:CPU",
            "PJRT_DEVICE": "CPU",
            "dtypes": [True, True, False, False],
            "memory": True,
            "new_group": "torch.distributed.distributed_c10d",  # torch_xla replaces it for everyone
        }
    ]


def faults() -> int:
    """Pages that the kernel has to clear where 64 MB are freed and allocated again, after some times."""
    for _ in range(24):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


# In a process whose heap has no free block of that size yet, which glibc would take whatever its settings are.
BY_DEFAULT = """
import resource
from nxdt_nemo.runtime.xla.freed_memory import give_back_freed_memory, keep_freed_memory

def faults():
    for _ in range(24):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"1" * (1 << 26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
kept = faults()
give_back_freed_memory()
print(before, kept, faults())
"""


def test_freed_memory_is_kept_until_it_is_given_back(pools: Callable[..., list[Any]]) -> None:
    [on_the_lane] = pools(1, faults)
    assert on_the_lane < 100
    done = subprocess.run([sys.executable, "-c", BY_DEFAULT], capture_output=True, text=True, check=True)
    before, kept, given_back = map(int, done.stdout.split())
    assert min(before, given_back) > 20 and kept * 10 < before  # 32 where the kernel's pages are huge, else 16,384


def products() -> list[tuple[bool, float, float]]:
    """Of a large matrix and less: is it copied first, and how far product and gradient are from the host's."""
    import torch_xla

    found, lane = [], lane_here()
    for many, rows, columns in ((128, 256, 1024), (128, 255, 1024), (127, 256, 1024), (128, 300, 1000)):
        x, weight = torch.randn(2, many, columns), torch.randn(rows, columns)
        here = [tensor.to(lane.device()).requires_grad_() for tensor in (x, weight)]
        product = lane.matmul(here[0], here[1].t())
        copied = "opt-barrier" in torch_xla._XLAC._get_xla_tensors_hlo([product])
        product.sum().backward()
        gradient = x.sum((0, 1)).expand(rows, columns)
        away = [
            float((there.detach().cpu() - wanted).norm() / wanted.norm())
            for there, wanted in ((product, x @ weight.t()), (here[1].grad, gradient))
        ]
        found.append((copied, *away))
    return found


def test_a_large_transposed_matrix_is_copied(pools: Callable[..., list[Any]]) -> None:
    [found] = pools(1, products)
    assert [copied for copied, *_ in found] == [True, False, False, False]
    assert max(away for _, *both in found for away in both) < 1e-6


def steps_after_loading() -> list[int]:
    """Graphs that three steps compile before the moments are loaded, and three after it."""
    import torch_xla.core.xla_model as xm

    from nxdt_nemo.apex.optimizers import FusedAdam
    from nxdt_nemo.runtime.xla.metrics import graphs_compiled

    lane = lane_here()
    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    optimizer = FusedAdam(lane.place(layers).parameters())
    lane.cut()
    x, found = torch.ones(2, 8).to(lane.device()), []
    for _ in range(2):
        lane.cut()
        before = graphs_compiled()
        for _ in range(3):
            layers(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            lane.step_boundary()
            xm.wait_device_ops()
        found.append(graphs_compiled() - before)
        saved = optimizer.state_dict()
        saved["state"] = {
            number: {key: moment.cpu().clone() for key, moment in state.items()}
            for number, state in saved["state"].items()
        }
        optimizer.load_state_dict(saved)
    return found


def test_loaded_moments_are_no_other_graph(pools: Callable[..., list[Any]]) -> None:
    [(first, loaded)] = pools(1, steps_after_loading)
    assert first >= 1 and loaded == 0


def draws() -> dict[str, list[float]]:
    """The same seed twice, a state put back, and a seed beyond 63 bits; with a boundary between."""
    lane = lane_here()

    def three() -> torch.Tensor:
        return torch.rand(3, device=lane.device())

    lane.manual_seed(5)
    first = three()
    lane.step_boundary()
    state = lane.rng_state()
    second = three()
    lane.step_boundary()
    lane.set_rng_state(state)
    again = three()
    lane.manual_seed(5)
    found = {"first": first, "second": second, "again": again, "anew": three()}
    lane.manual_seed(2**64 - 3)
    state = lane.rng_state()
    found["large"] = three()
    lane.set_rng_state(state)
    found["large again"] = three()
    return {name: value.cpu().tolist() for name, value in found.items()}


def test_random_states(pools: Callable[..., list[Any]]) -> None:
    [found] = pools(1, draws)
    assert found["first"] == found["anew"] != found["second"] == found["again"]
    assert found["large"] == found["large again"] != found["first"]


def deferred() -> list[list[float]]:
    """What has arrived after each of three boundaries."""
    lane, arrived, after = lane_here(), [], []
    x = torch.ones(2, device=lane.device())
    for step in range(3):
        lane.defer(lambda value: arrived.append(float(value.sum())), x * step)
        lane.step_boundary()
        after.append(list(arrived))
    return after


def test_values_are_read_a_step_later(pools: Callable[..., list[Any]]) -> None:
    assert pools(1, deferred) == [[[], [0.0], [0.0, 2.0]]]


def after_an_error() -> list[Any]:
    """What arrives of two whole steps and half of a third one, and the graphs that this compiles."""
    from nxdt_nemo.runtime.xla.metrics import graphs_compiled

    lane, arrived = lane_here(), []
    x = torch.ones(2, device=lane.device())
    for step in range(2):
        y = x * step
        lane.step_boundary()
        lane.defer(lambda *values: arrived.append([float(value.sum()) for value in values]), y, torch.ones(()))
    lane.defer(lambda value: arrived.append(value.tolist()), (x + 3).cumsum(0))
    before = graphs_compiled()
    lane.salvage()
    return [arrived, graphs_compiled() - before]


def test_a_step_that_was_cut_short_is_not_handed_over(pools: Callable[..., list[Any]]) -> None:
    assert pools(1, after_an_error) == [[[[0.0, 1.0], [2.0, 1.0]], 0]]


def test_a_placed_module_keeps_marks_and_ties(pools: Callable[..., list[Any]]) -> None:
    assert pools(1, placed) == [{"devices": {"xla:0"}, **PLACED}]


def collectives() -> dict[str, Any]:
    """By the lane's table, and by torch.distributed's own calls."""
    import torch.distributed as dist

    x, found = by_the_table()
    ours = x.clone()
    dist.all_reduce(ours)
    whole = torch.empty(4, 2, device=x.device)
    dist.all_gather_into_tensor(whole, x)
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x)
    mine = torch.empty(1, 2, device=x.device)
    dist.reduce_scatter_tensor(mine, x)
    swapped, mean = torch.empty_like(x), torch.empty(2, 1, device=x.device)
    dist.all_to_all_single(swapped, x)
    dist.reduce_scatter_tensor(mean, torch.stack([x[:1].T, x[:1].T]), op=dist.ReduceOp.AVG)
    found |= {"dist.sum": ours, "dist.whole": whole, "dist.parts": torch.cat(parts), "dist.mine": mine}
    whole_numbers = torch.tensor([3 + dist.get_rank()], device=x.device)
    dist.all_reduce(whole_numbers, op=dist.ReduceOp.AVG)
    found |= {"dist.swapped": swapped, "dist.mean": mean.T, "dist.mean of whole numbers": whole_numbers}
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": dist.get_rank()})
    dist.barrier()
    return {name: value.cpu().tolist() for name, value in found.items()} | {"objects": objects}


def test_two_processes(pools: Callable[..., list[Any]]) -> None:
    zero, one = [[0.0, 1.0], [2.0, 3.0]], [[10.0, 11.0], [12.0, 13.0]]
    total = [[10.0, 12.0], [14.0, 16.0]]
    alike = {
        "dist.mean": [[5.0, 6.0]],
        "dist.mean of whole numbers": [3],
        "dist.sum": total,
        "dist.whole": zero + one,
        "dist.parts": zero + one,
        "objects": [{"rank": 0}, {"rank": 1}],
    }
    own = [expected(rank) | {"dist.mine": [total[rank]], "dist.swapped": [zero[rank], one[rank]]} for rank in range(2)]
    assert pools(2, collectives) == [alike | part for part in own]


def refused() -> list[str]:
    import torch.distributed as dist

    from nxdt_nemo.errors import LaneError

    lane, said = lane_here(), []
    x = torch.ones(2, device=lane.device())
    calls = (
        lambda: dist.all_reduce(x, op=dist.ReduceOp.PRODUCT),
        lambda: dist.gather(x, [x.clone()], dst=0),
        lambda: dist.reduce_scatter_tensor(x, x.clone(), op=dist.ReduceOp.MAX),
        lambda: dist.scatter(x, [x.clone()], src=0),
    )
    for call in calls:
        try:
            call()
        except LaneError as error:
            said.append(str(error))
    return said


def test_what_has_no_counterpart_says_so(pools: Callable[..., list[Any]]) -> None:
    [found] = pools(1, refused)
    assert "reducing by" in found[0] and "sum, avg, max, min" in found[0]
    assert "gather of tensors on the device has no counterpart" in found[1]
    assert "reduce_scatter by max" in found[2]
    assert "scatter of tensors on the device has no counterpart" in found[3]


def passed_on() -> dict[str, Any]:
    """Both ranks send before they receive, as the stages of a pipeline do; then one after the other."""
    import torch.distributed as dist

    lane, rank = lane_here(), dist.get_rank()
    group, other = dist.new_group([0, 1]), 1 - rank
    mine = torch.full((300, 300), float(rank), device=lane.device()) + 1
    theirs = torch.empty(300, 300, device=lane.device(), requires_grad=True)
    state = lane.rng_state()
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, mine, other, group), dist.P2POp(dist.irecv, theirs, other, group)]
    )
    for work in works:
        work.wait()
    later = torch.zeros(2, dtype=torch.bfloat16, device=lane.device())
    if rank == 0:
        dist.send(later + 3, 1)
    else:
        dist.recv(later, 0)
    return {
        "swapped": theirs.detach().cpu().unique().tolist(),
        "leaf": theirs.is_leaf and theirs.requires_grad,
        "done": all(work.is_completed() for work in works),
        "later": later.cpu().tolist(),
        "random state": torch.equal(state, lane.rng_state()),
    }


def test_both_neighbours_may_send_first(pools: Callable[..., list[Any]]) -> None:
    alike = {"leaf": True, "done": True, "random state": True}
    assert pools(2, passed_on) == [
        {"swapped": [2.0], "later": [0.0, 0.0]} | alike,
        {"swapped": [1.0], "later": [3.0, 3.0]} | alike,
    ]


# By operator, what leads to it: a method of the process group that torch.distributed's functions call.
ON_GLOO: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "allgather_": lambda group, x: group.allgather([[x, x]], [x]),
    "allgather_coalesced_": lambda group, x: group.allgather_coalesced([[x], [x]], [x]),
    "allgather_into_tensor_coalesced_": lambda group, x: group.allgather_into_tensor_coalesced([x], [x[:1]]),
    "allreduce_": lambda group, x: group.allreduce([x]),
    "allreduce_coalesced_": lambda group, x: group.allreduce_coalesced([x]),
    "alltoall_": lambda group, x: group.alltoall([x, x], [x, x]),
    "alltoall_base_": lambda group, x: group.alltoall_base(x, x, [], []),
    "broadcast_": lambda group, x: group.broadcast(x, 0),
    "gather_": lambda group, x: group.gather([x, x] if group.rank() == 0 else [], x, 0),
    "_allgather_base_": lambda group, x: group._allgather_base(x, x[:1]),
    "_reduce_scatter_base_": lambda group, x: group._reduce_scatter_base(x[:1], x),
    "recv_": lambda group, x: group.recv([x], 1 - group.rank(), 0),
    "recv_any_source_": lambda group, x: group.recv_anysource([x], 0),
    "reduce_": lambda group, x: group.reduce(x, 0),
    "reduce_scatter_": lambda group, x: group.reduce_scatter(x, [x, x]),
    "reduce_scatter_tensor_coalesced_": lambda group, x: group.reduce_scatter_tensor_coalesced([x[:1]], [x]),
    "scatter_": lambda group, x: group.scatter(x, [x, x] if group.rank() == 0 else [], 0),
    "send": lambda group, x: group.send([x], 1 - group.rank(), 0),
}


def on_gloo(operator: str) -> tuple[str, list[float], list[float]]:
    """What a group of the user's own on gloo says to a tensor of the device; the tensor; and what it reduces."""
    import torch.distributed as dist

    from nxdt_nemo.errors import LaneError

    lane = lane_here()
    group = dist.new_group(backend="gloo")
    x, said = torch.ones(2, device=lane.device()), ""
    try:
        ON_GLOO[operator](group, x)
    except LaneError as error:
        said = str(error)
    host = torch.ones(2)
    dist.all_reduce(host, group=group)
    dist.destroy_process_group(group)
    return said, x.tolist(), host.tolist()


@pytest.mark.parametrize("operator", ON_GLOO)
def test_gloo_refuses_tensors_of_the_device(pools: Callable[..., list[Any]], operator: str) -> None:
    said = (
        f"{operator.strip('_')} of tensors on the device, in a process group of another backend, would change nothing; "
        "make the group without backend=, or give it tensors of the host"
    )
    assert pools(2, on_gloo, operator) == [(said, [1.0, 1.0], [2.0, 2.0])] * 2


def test_no_operator_of_tensors_is_forgotten() -> None:
    there = {name.removeprefix("c10d::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("c10d::")}
    assert set(ON_GLOO) == set(OPERATORS) == there - {"barrier", "monitored_barrier_"}


def looked_at(within: bool) -> dict[str, int]:
    """How much is computed when the host looks at one of two values that share a product."""
    import torch_xla.debug.metrics as met

    from nxdt_nemo.runtime.xla.metrics import counters

    lane = lane_here()
    x = torch.full((4, 4), 0.5, device=lane.device())
    lane.cut()
    before = counters()
    with lane.reading() if within else contextlib.nullcontext():
        product = (x @ x).exp()
        found = bool(product.sum() > 0)
        lane.cut()
    after = counters()
    assert found and met.metric_data("CompileTime") is not None
    return {name: after[name] - before.get(name, 0) for name in ("compiled", "read")}


def test_a_reading_hands_over_all(pools: Callable[..., list[Any]]) -> None:
    """One graph for both; without it the product is computed again in a second one."""
    assert pools(1, looked_at, True) == [{"compiled": 1, "read": 1}]
    assert pools(1, looked_at, False) == [{"compiled": 2, "read": 1}]


def stepped(ended_by_caller: bool) -> list[float]:
    """What has arrived after three steps of megatron-core's optimizer, in a loop that ends its steps itself or not."""
    lane, arrived = lane_here(), []
    with lane.step_goes_on() if ended_by_caller else contextlib.nullcontext():
        for step in range(3):
            lane.defer(lambda value: arrived.append(float(value)), torch.tensor(float(step)).to(lane.device()))
            lane.optimizer_stepped()
    found = list(arrived)
    lane.settle()
    return found


def test_an_optimizers_step_ends_that_of_a_loop_that_says_nothing(pools: Callable[..., list[Any]]) -> None:
    assert pools(1, stepped, False) == [[0.0, 1.0]]
    assert pools(1, stepped, True) == [[]]
