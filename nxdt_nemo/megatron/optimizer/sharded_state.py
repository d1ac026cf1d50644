"""A sharded optimizer's state in checkpoints: by the parameter's name, in the parameter's shape.

Room megatron/. The format of docs/checkpoints.md: the keys and shapes are those that an unsharded optimizer writes, so
that data-, tensor- and pipeline-parallel sizes, and the optimizer, may be others when it is read. A parameter that is
cut between ranks is put together on one of them, the one that has most of it. Proof: tests/megatron/test_zero.py,
tests/nemo/test_zero.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from torch import Tensor, nn

from nxdt_nemo.errors import UserError
from nxdt_nemo.megatron.optimizer.traced_zero import HostBucket
from nxdt_nemo.megatron.optimizer.zero import Bucket, Division, Part

__all__ = [
    "PREFIX",
    "Loaded",
    "Tensors",
    "common_rate",
    "groups_of",
    "load_pieces",
    "state_template",
    "states_of",
    "whole_states",
]

PREFIX = "optimizer.state"
Tensors = dict[str, Tensor]  # fp32_param (of half precision parameters), exp_avg, exp_avg_sq
StateOf = Callable[[Part], Tensors]
Sharded = dict[int, dict[str, Any]]


def whole_states(
    buckets: Sequence[Bucket | HostBucket],
    params: Sequence[nn.Parameter],
    state_of: StateOf,
    model: Mapping[str, Any],
    host_groups: Mapping[dist.ProcessGroup, dist.ProcessGroup],
    instance: int = 0,
) -> Sharded:
    """The sharded state to save: {place in `params`: {name: ShardedTensor or factory}} of what this rank owns.

    params        all parameters of the optimizer
    state_of      a part's tensors, [n] float32
    model         the model's sharded state dict
    host_groups   a gloo group for each bucket's group: pieces go from host to host
    instance      of several groups that hold the same state: what the first has is written
    Each rank of the buckets' groups has to call it.
    """
    places = _places(params, model)
    sharded: Sharded = {}
    for bucket in buckets:
        for param, tensors in _whole(bucket, state_of, host_groups[bucket.group]):
            place, entry = places[param]
            sharded[place] = {name: _sharded(entry, tensor, name, instance) for name, tensor in tensors.items()}
    return sharded


def state_template(
    buckets: Sequence[Bucket | HostBucket],
    params: Sequence[nn.Parameter],
    state_of: StateOf,
    model: Mapping[str, Any],
    instance: int = 0,
) -> Sharded:
    """What to load: as whole_states, with memory to load it into. No rank reads what another owns."""
    places = _places(params, model)
    sharded: Sharded = {}
    for bucket in buckets:
        for param, first, last in bucket.spans:
            if _owner(bucket, first, last) != bucket.group.rank():
                continue
            place, entry = places[param]
            sharded[place] = {
                name: _sharded(entry, torch.empty(param.shape, dtype=tensor.dtype), name, instance)
                for name, tensor in state_of(bucket.pieces[param]).items()
            }
    return sharded


def load_pieces(
    buckets: Sequence[Bucket | HostBucket],
    params: Sequence[nn.Parameter],
    state_of: StateOf,
    loaded: Loaded,
    host_groups: Mapping[dist.ProcessGroup, dist.ProcessGroup],
) -> list[Bucket | HostBucket]:
    """Copy what each rank has loaded of the parameters it owns into all ranks' pieces; returns the buckets with any.

    loaded   what state_template gave, or whole_states: some megatron-core loops load into what would be saved
    Each rank of the buckets' groups has to call it.
    """
    places = {param: place for place, param in enumerate(params)}
    filled = []
    for bucket in buckets:
        host = host_groups[bucket.group]
        mine = torch.tensor([any(places[param] in loaded.state for param in bucket.pieces)], dtype=torch.int32)
        dist.all_reduce(mine, dist.ReduceOp.MAX, group=host)
        if not mine.item():
            continue
        for param, tensors in _parts(bucket, places, state_of, loaded, host):
            piece = bucket.pieces[param]
            for name, tensor in state_of(piece).items():
                tensor.copy_(tensors[name])
            piece.publish(loaded.steps)
        filled.append(bucket)
    return filled


@dataclass(frozen=True)
class Loaded:
    """What an optimizer's loaded state dict holds, wherever its writer keeps it.

    state    {place of the parameter: its tensors}
    groups   saved hyper-parameters
    steps    made so far
    """

    state: dict[int, Tensors]
    groups: list[dict[str, Any]]
    steps: int

    @classmethod
    def of(cls, state_dict: Mapping[str, Any]) -> Loaded:
        """With main parameters a writer nests state and groups under `optimizer`; NeMo's Apex optimizer never does.

        Apex's and TransformerEngine's FusedAdam count steps in a group's `step`, as here; megatron-core with torch's
        Adam in the state's `common_step`; NeMo with Apex's DistributedFusedAdam in the state's `step`.
        """
        states, groups = states_of(state_dict), groups_of(state_dict)
        counts = [*(group.get("step") for group in groups), states.get("common_step"), states.get("step")]
        steps = max((int(count) for count in counts if count is not None), default=0)
        return cls({key: value for key, value in states.items() if isinstance(key, int)}, groups, steps)

    def for_groups(self, count: int) -> list[dict[str, Any]]:
        """The groups. Raises UserError unless there are `count`: a scheduler's rates go to groups by their number."""
        if len(self.groups) != count:
            reason = f"parameter groups: {len(self.groups)} in the checkpoint, {count} in this optimizer"
            raise UserError(reason, fix="resume with the optimizer that saved it")
        return self.groups


def states_of(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """An optimizer's `state`, at the top of its state dict and under `optimizer`."""
    parts = (state_dict, state_dict.get("optimizer", {}))
    return {key: value for part in parts for key, value in (part.get("state") or {}).items()}


def groups_of(state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Its `param_groups`, from the first of these places that has any."""
    parts = (state_dict, state_dict.get("optimizer", {}))
    return next((part["param_groups"] for part in parts if any(part.get("param_groups", []))), [])


def common_rate(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"lr": rate} where all groups have one: what the first step uses, and a scheduler sets from the second on."""
    rates = {group["lr"] for group in groups if "lr" in group}
    return {"lr": rates.pop()} if len(rates) == 1 else {}


def _places(params: Sequence[nn.Parameter], model: Mapping[str, Any]) -> dict[nn.Parameter, tuple[int, Any]]:
    """Each parameter's place in `params`, and its entry in the model's sharded state dict."""
    entries = get_param_id_to_sharded_param_map(model, iter(params))
    missing = [place for place in range(len(params)) if place not in entries]
    if missing:
        raise ValueError(f"parameters {missing} of the optimizer are not in the model's sharded state dict")
    return {param: (place, entries[place]) for place, param in enumerate(params)}


def _owner(bucket: Division, first: int, last: int) -> int:
    """The rank that has most of a parameter, the lowest of equals."""
    return max(bucket.holders(first, last), key=lambda holder: (holder[2] - holder[1], -holder[0]))[0]


def _whole(
    bucket: Bucket | HostBucket, state_of: StateOf, host: dist.ProcessGroup
) -> Iterator[tuple[nn.Parameter, Tensors]]:
    """The parameters that this rank owns, with their tensors in the parameters' shapes."""
    rank, ranks = bucket.group.rank(), dist.get_process_group_ranks(bucket.group)
    under_way: list[Any] = []
    ready: list[tuple[nn.Parameter, Tensors]] = []
    for param, first, last in bucket.spans:
        holders = bucket.holders(first, last)
        owner = _owner(bucket, first, last)
        mine = state_of(bucket.pieces[param]) if any(holder == rank for holder, *_ in holders) else {}
        if rank != owner:
            under_way += [dist.isend(tensor.cpu(), ranks[owner], group=host) for tensor in mine.values()]
        elif len(holders) == 1:
            ready.append((param, {name: tensor.view(param.shape) for name, tensor in mine.items()}))
        else:
            whole = {name: torch.empty(last - first, dtype=tensor.dtype) for name, tensor in mine.items()}
            for holder, start, stop in holders:
                for name, tensor in mine.items():
                    if holder == rank:
                        whole[name][start:stop].copy_(tensor)
                    else:
                        under_way.append(dist.irecv(whole[name][start:stop], ranks[holder], group=host))
            ready.append((param, {name: tensor.view(param.shape) for name, tensor in whole.items()}))
    for work in under_way:
        work.wait()
    yield from ready


def _parts(
    bucket: Bucket | HostBucket,
    places: Mapping[nn.Parameter, int],
    state_of: StateOf,
    loaded: Loaded,
    host: dist.ProcessGroup,
) -> Iterator[tuple[nn.Parameter, Tensors]]:
    """The way back: this rank's pieces, [n] each, of what the parameters' owners have loaded."""
    rank, ranks = bucket.group.rank(), dist.get_process_group_ranks(bucket.group)
    under_way: list[tuple[Any, Tensor]] = []
    ready: list[tuple[nn.Parameter, Tensors]] = []
    for param, first, last in bucket.spans:
        owner = _owner(bucket, first, last)
        for holder, start, stop in bucket.holders(first, last):
            if rank not in (owner, holder):
                continue
            mine = state_of(bucket.pieces[param])
            if rank == owner:
                whole = loaded.state[places[param]]
                parts = {name: whole[name].reshape(-1)[start:stop] for name in mine}
                if rank != holder:
                    sent = [part.to(mine[name].dtype).cpu().contiguous() for name, part in parts.items()]
                    under_way += [(dist.isend(part, ranks[holder], group=host), part) for part in sent]
            else:
                parts = {name: torch.empty(stop - start, dtype=tensor.dtype) for name, tensor in mine.items()}
                under_way += [(dist.irecv(part, ranks[owner], group=host), part) for part in parts.values()]
            if rank == holder:
                ready.append((param, parts))
    for work, _ in under_way:
        work.wait()
    yield from ready


def _sharded(entry: Any, tensor: Tensor, name: str, replica: int) -> Any:
    """The entry for one tensor of a parameter's state. Replica 0 of the data-parallel ranks is the one that counts."""
    made = make_sharded_optimizer_tensor(entry, tensor, f"{PREFIX}.{name}")
    made.replica_id = (*made.replica_id[:2], replica)
    return made
