"""The stand-in's torch.compile(backend="neuron"): runs a graph as it is, and keeps it."""

from collections.abc import Callable
from typing import Any

import torch

graphs: list[torch.fx.Graph] = []  # since the process began


def compiled(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
    """What torch's dynamo calls, by an entry point."""
    graphs.append(graph.graph)
    return graph.forward
