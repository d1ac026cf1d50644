"""A process group whose ranks keep the order in which they are given.

Room runtime/. Stands in for torch.distributed.new_group, which sorts the ranks: under a placement (placement.py) the
first stage of a pipeline may sit on the higher rank. Uses torch's private helpers, as new_group does (torch 2.9).
Proof: tests/megatron/test_parallel_state.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

__all__ = ["new_group"]


def new_group(
    ranks: Sequence[int],
    *,
    timeout: timedelta | None = None,
    backend: str | None = None,
    options: Any = None,
    name: str | None = None,
) -> dist.ProcessGroup | None:
    """The group of these global ranks, ranks[i] in place i; None on a rank outside it.

    All ranks of the world call it alike, as they do new_group. Raises ValueError for a rank that is given twice or
    is not in the world.
    """
    everyone = c10d._get_default_group()
    if len(set(ranks)) < len(ranks) or not set(ranks) <= set(range(everyone.size())):
        raise ValueError(f"group {name}: ranks {list(ranks)} are not distinct ranks of a world of {everyone.size()}")
    default_backend, store = c10d._world.pg_map[everyone]
    kind = c10d.Backend(backend or default_backend)
    made, _ = c10d._new_process_group_helper(
        len(ranks),
        ranks.index(everyone.rank()) if everyone.rank() in ranks else None,
        list(ranks),
        kind,
        store,
        c10d._process_group_name(list(ranks), use_hashed_name=False),
        backend_options=options,
        timeout=timeout or c10d._get_default_timeout(kind),
        group_desc=name,
    )
    c10d._world.pg_group_ranks[made] = {rank: place for place, rank in enumerate(ranks)}
    return made if isinstance(made, dist.ProcessGroup) else None
