"""`_target_`: the classes and functions that a configuration may have called.

Room config/ (leaf). hydra.utils.instantiate calls whatever a `_target_` names, `os.system` too; a configuration is data
from elsewhere. May import the standard library and nxdt_nemo.errors. Proof: tests/config/test_targets.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nxdt_nemo.config.report import or_list
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["ALLOWED", "targets"]

KEY = "_target_"
# Packages whose classes NeMo's own configurations name.
ALLOWED = ("nemo", "megatron", "lightning", "pytorch_lightning", "torch.optim", "torchmetrics", "nxdt_nemo")


def targets(view: View) -> Iterator[ConfigError]:
    """Every `_target_`, at any depth, is of a package that is allowed, or that neuron.targets adds."""
    more = view.get("neuron.targets", [])
    allowed = (*ALLOWED, *(more if isinstance(more, list) else ()))
    for path, target in _found(view.plain, view.section):
        if not any(str(target) == name or str(target).startswith(f"{name}.") for name in allowed):
            reason = f"{path}={target} is not of {or_list(ALLOWED)}"
            yield view.error(reason, "if you trust it, add its package: +neuron.targets=[...]")


def _found(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            inner = f"{path}.{key}" if path else str(key)
            if key == KEY:
                yield inner, value
            yield from _found(value, inner)
    elif isinstance(node, list):
        for at, value in enumerate(node):
            yield from _found(value, f"{path}[{at}]")
