"""`exp_manager.log_parameter_norm` and `exp_manager.log_gradient_norm`: NxD Training's keys, and its names in the log.

Room nemo/. A Lightning callback; enters where nemo.utils.exp_manager adds its own (nemo/utils/exp_manager.py).
Proof: tests/megatron/test_norms.py (the numbers), tests/nemo/test_exp_manager.py (the log).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from nxdt_nemo.megatron.optimizer.norms import counted, gradient_norm, parameter_norm, sharded_gradient_norm

__all__ = ["NormLogger"]


class NormLogger(Callback):
    """Logs `parameter_norm` and `gradient_norm`, before the step and before clipping, in the steps that are logged.

    parameters, gradients   which of the two
    Values stay tensors until a logger writes them.
    """

    def __init__(self, parameters: bool, gradients: bool) -> None:
        self._parameters, self._gradients = parameters, gradients

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Both norms of the weights that made this step's loss."""
        if not trainer._logger_connector.should_update_logs:
            return
        if self._parameters:
            self._log(pl_module, "parameter_norm", parameter_norm(_parameters(pl_module)))
        if self._gradients:
            self._log(pl_module, "gradient_norm", _gradient_norm(pl_module, optimizer))

    @staticmethod
    def _log(module: Any, name: str, value: Tensor) -> None:
        module.log(name, value, prog_bar=True, rank_zero_only=True, batch_size=1)


def _parameters(module: Any) -> Iterator[Any]:
    chunks = module.model if isinstance(module.model, list) else [module.model]
    for chunk in chunks:
        yield from chunk.parameters()


def _gradient_norm(module: Any, optimizer: Any) -> Tensor:
    """Wherever the optimizer keeps the gradients, after their reduction over the ranks."""
    if hasattr(optimizer, "mcore_optimizer"):  # mcore_distributed_optim
        return sharded_gradient_norm(optimizer.mcore_optimizer)
    if hasattr(optimizer, "grad_norm"):  # distributed_fused_adam
        norm: Tensor = optimizer.grad_norm(counted(optimizer.parameters()))
        return norm
    if hasattr(optimizer, "get_parameters_with_grad"):  # float32 main parameters
        return gradient_norm(optimizer.get_parameters_with_grad())
    return gradient_norm(_parameters(module))
