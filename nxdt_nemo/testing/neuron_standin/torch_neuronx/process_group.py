"""The stand-in's process group: gloo on host copies, with the limits that TorchNeuron's was seen to have.

It takes device tensors only; the first group is made before anything is on the device; a barrier is the world's; an
all-to-all has equal parts. What it refuses it refuses with the exceptions of TorchNeuron's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch_neuronx import _C

c10d: Any = _distributed_c10d
Tensors = Sequence[torch.Tensor]


class NeuronProcessGroup(c10d.ProcessGroup):
    """A process group of torch.distributed's, in Python, as TorchNeuron's is."""

    first = True

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        assert not (NeuronProcessGroup.first and _C.allocations()), "the device was used before init_process_group"
        NeuronProcessGroup.first = False
        self._gloo = c10d.ProcessGroupGloo(store, rank, size, timeout)
        self._group_name = self._group_desc = ""

    def getBackendName(self) -> str:
        return "neuron"

    def _get_backend(self, device: torch.device) -> Any:
        return self

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("neuron")]

    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    @property
    def group_name(self) -> str:
        return self._group_name

    def _set_group_desc(self, name: str) -> None:
        self._group_desc = name

    @property
    def group_desc(self) -> str:
        return self._group_desc

    def _run(self, call: Callable[[list[Any], list[Any]], Any], given: Sequence[Any], results: Sequence[Any]) -> Any:
        """call(given, results) on host copies; the results' copies go back to the device."""
        hosts = _map(_host, given), _map(_host, results)
        call(*hosts).wait()
        _fill(_flat(results), _flat(hosts[1]))
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(list(_flat(results)))
        return c10d._create_work_from_future(future)

    def allreduce(self, tensors: Tensors, opts: Any = None) -> Any:
        opts = opts or c10d.AllreduceOptions()
        return self._run(lambda _, out: self._gloo.allreduce(out, opts), [], tensors)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Any:
        plain = c10d.AllreduceOptions()
        if opts is not None:
            plain.reduceOp = opts.reduceOp
        for tensor in tensors[1:]:
            self.allreduce([tensor], plain)
        return self.allreduce(tensors[:1], plain)

    def broadcast(self, tensors: Tensors, opts: Any = None) -> Any:
        opts = opts or c10d.BroadcastOptions()
        return self._run(lambda _, out: self._gloo.broadcast(out, opts), [], tensors)

    def reduce(self, tensors: Tensors, opts: Any = None) -> Any:
        opts = opts or c10d.ReduceOptions()
        return self._run(lambda _, out: self._gloo.reduce(out, opts), [], tensors)

    def _allgather_base(self, whole: torch.Tensor, mine: torch.Tensor, opts: Any = None) -> Any:
        opts = opts or c10d.AllgatherOptions()
        return self._run(lambda given, out: self._gloo._allgather_base(out[0], given[0], opts), [mine], [whole])

    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Any:
        opts = opts or c10d.AllgatherOptions()
        return self._run(lambda given, out: self._gloo.allgather(out, given, opts), inputs, outputs)

    def allgather_into_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        works = [self._allgather_base(whole, mine) for whole, mine in zip(outputs, inputs, strict=True)]
        return works[-1]

    def _reduce_scatter_base(self, mine: torch.Tensor, whole: torch.Tensor, opts: Any = None) -> Any:
        opts = opts or c10d.ReduceScatterOptions()
        return self._run(lambda given, out: self._gloo._reduce_scatter_base(out[0], given[0], opts), [whole], [mine])

    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> Any:
        opts = opts or c10d.ReduceScatterOptions()
        return self._run(lambda given, out: self._gloo.reduce_scatter(out, given, opts), inputs, outputs)

    def reduce_scatter_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        works = [self._reduce_scatter_base(mine, whole, opts) for mine, whole in zip(outputs, inputs, strict=True)]
        return works[-1]

    def alltoall_base(
        self, output: torch.Tensor, given: torch.Tensor, out_sizes: list[int], sizes: list[int], opts: Any = None
    ) -> Any:
        for asked in (out_sizes, sizes):
            if len(set(asked)) > 1:
                raise NotImplementedError(f"alltoall_base: only even split sizes are supported, got {asked}")
        opts = opts or c10d.AllToAllOptions()
        return self._run(
            lambda ins, out: self._gloo.alltoall_base(out[0], ins[0], out_sizes, sizes, opts), [given], [output]
        )

    # torch 2.14 calls them by these names.
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base

    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Any:
        opts = opts or c10d.GatherOptions()
        return self._run(lambda given, out: self._gloo.gather(out, given, opts), inputs, outputs)

    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> Any:
        opts = opts or c10d.ScatterOptions()
        return self._run(lambda given, out: self._gloo.scatter(out, given, opts), inputs, outputs)

    def send(self, tensors: Tensors, target: int, tag: int = 0) -> Any:
        return self._gloo.send(_map(_host, tensors), target, tag)

    def recv(self, tensors: Tensors, source: int, tag: int = 0) -> Any:
        hosts = _map(_host, tensors)
        return _Receiving(self._gloo.recv(hosts, source, tag), tensors, hosts)

    def barrier(self, opts: Any = None) -> Any:
        if dist.get_world_size() != self.size():
            raise NotImplementedError("barrier is implemented only for the default group")
        return self._gloo.barrier(c10d.BarrierOptions())


class _Receiving(dist.Work):
    """Under way until somebody waits: a rank that receives before it sends may not stop at the receiving."""

    def __init__(self, work: Any, tensors: Tensors, hosts: Tensors) -> None:
        super().__init__()
        self._work, self._tensors, self._hosts = work, tensors, hosts

    def wait(self, timeout: Any = None) -> bool:
        self._work.wait()
        _fill(self._tensors, self._hosts)
        return True


@torch.no_grad()
def _fill(tensors: Tensors, hosts: Tensors) -> None:
    for tensor, host in zip(tensors, hosts, strict=True):
        tensor.copy_(host)


def _host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "neuron":
        raise ValueError(f"a tensor on {tensor.device} in a collective of the neuron backend")
    return tensor.detach().cpu().contiguous()


def _map(function: Callable[[torch.Tensor], torch.Tensor], tensors: Sequence[Any]) -> list[Any]:
    return [function(one) if isinstance(one, torch.Tensor) else _map(function, one) for one in tensors]


def _flat(tensors: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for one in tensors for leaf in ([one] if isinstance(one, torch.Tensor) else _flat(one))]
