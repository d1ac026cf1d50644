"""One Adam step over lists of tensors.

Room apex/. Stands in for amp_C.multi_tensor_adam*. Proof: tests/apex/test_optimizers.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .lists import TRACED_DEVICES, Tensors, in_float32, store, undone_if

__all__ = ["AdamSettings", "adam_update", "multi_tensor_adam", "multi_tensor_adam_capturable"]

Scalar = float | torch.Tensor

# torch has a one-pass kernel for these (10 to 25 times faster than the foreach formula on a 16M parameter model);
# it takes the same step up to rounding. Where graphs are traced the compiler does the fusing.
_ONE_PASS_DEVICES = frozenset({"cpu"})

# Temporaries are twice the size of the parameters in hand; this bounds them.
_ELEMENTS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class AdamSettings:
    """What one step needs beside the tensors.

    step counts from 1; lr and step may be one-element tensors. decoupled: AdamW, else L2 regularization.
    """

    lr: Scalar
    beta1: float
    beta2: float
    eps: float
    step: int | torch.Tensor
    decoupled: bool
    bias_correction: bool
    weight_decay: float

    def of_this_step(self, like: torch.Tensor) -> Sequence[torch.Tensor]:
        """lr, 1 - beta1^step and 1 - beta2^step, float32 [] beside `like`.

        Numbers go to the device together, once a step, as data: a new value must not be a new constant in a graph, and
        a graph of a number is not the graph of 0 or of 1 where constants are folded.
        """
        lr, step = self.lr, self.step
        if not isinstance(lr, torch.Tensor) and not isinstance(step, torch.Tensor):
            corrections = [1.0 - beta**step if self.bias_correction else 1.0 for beta in (self.beta1, self.beta2)]
            return torch.tensor([lr, *corrections], dtype=torch.float32).to(like.device).unbind(0)
        return [self.learning_rate(like), self.correction(self.beta1, like), self.correction(self.beta2, like)]

    def correction(self, beta: float, like: torch.Tensor) -> torch.Tensor:
        """1 - beta^step, a float32 tensor: a new value each step must not be a new constant in a graph."""
        if not self.bias_correction:
            return torch.ones((), dtype=torch.float32, device=like.device)
        if isinstance(self.step, torch.Tensor):
            return 1.0 - torch.pow(beta, self.step.reshape(()).to(like.device, torch.float32))
        return torch.tensor(1.0 - beta**self.step, dtype=torch.float32, device=like.device)

    def learning_rate(self, like: torch.Tensor) -> torch.Tensor:
        """The learning rate as a scalar tensor beside `like`."""
        if isinstance(self.lr, torch.Tensor):
            return self.lr.reshape(()).to(like.device, torch.float32)
        return torch.tensor(self.lr, dtype=torch.float32, device=like.device)


def _runs(tensors: Tensors) -> Iterator[slice]:
    """Slices of the list with at most _ELEMENTS_AT_ONCE elements each, or one tensor."""
    start = elements = 0
    for index, tensor in enumerate(tensors):
        if index > start and elements + tensor.numel() > _ELEMENTS_AT_ONCE:
            yield slice(start, index)
            start, elements = index, 0
        elements += tensor.numel()
    if start < len(tensors):
        yield slice(start, len(tensors))


def _one_pass(grads: Tensors, params: Tensors, means: Tensors, squares: Tensors, s: AdamSettings) -> bool:
    """Take the step with torch's own kernel; False if it does not apply."""
    everything = [*grads, *params, *means, *squares]
    # The kernel walks raw memory, so all four must be laid out alike.
    fits = all(
        t.dtype == torch.float32 and t.device.type in _ONE_PASS_DEVICES and t.is_contiguous() for t in everything
    )
    if not (fits and s.bias_correction) or isinstance(s.step, torch.Tensor):
        return False
    kernel = torch._fused_adamw_ if s.decoupled else torch._fused_adam_
    step = torch.tensor(float(s.step))
    kernel(
        list(params),
        list(grads),
        list(means),
        list(squares),
        [],
        [step] * len(params),
        lr=s.lr if isinstance(s.lr, float) else s.learning_rate(step),
        beta1=s.beta1,
        beta2=s.beta2,
        weight_decay=s.weight_decay,
        eps=s.eps,
        amsgrad=False,
        maximize=False,
    )
    return True


def _formula(
    grads: Tensors,
    params: Tensors,
    means: Tensors,
    squares: Tensors,
    s: AdamSettings,
    numbers: Sequence[torch.Tensor],
) -> None:
    """Apex's formula in float32, for any device and dtype."""
    lr, correction1, correction2 = numbers
    g, p, m, v = (in_float32(tensors) for tensors in (grads, params, means, squares))
    if not s.decoupled and s.weight_decay:
        g = list(torch._foreach_add(g, p, alpha=s.weight_decay))
    torch._foreach_mul_(m, s.beta1)
    torch._foreach_add_(m, g, alpha=1 - s.beta1)
    torch._foreach_mul_(v, s.beta2)
    torch._foreach_addcmul_(v, g, g, value=1 - s.beta2)
    denominators = torch._foreach_div(v, correction2)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, s.eps)
    updates = torch._foreach_div(m, correction1)
    torch._foreach_div_(updates, denominators)
    if s.decoupled and s.weight_decay:
        torch._foreach_add_(updates, p, alpha=s.weight_decay)
    torch._foreach_mul_(updates, lr)
    torch._foreach_sub_(p, updates)
    for computed, stored in ((p, params), (m, means), (v, squares)):
        store(computed, stored)


def _traced(
    grads: Tensors,
    params: Tensors,
    means: Tensors,
    squares: Tensors,
    s: AdamSettings,
    numbers: Sequence[torch.Tensor],
) -> None:
    """The formula with as few operations as torch's one-pass kernel has, for a device that traces."""
    lr, correction1, correction2 = numbers
    size, root = lr / correction1, correction2.sqrt()
    kept = 1.0 - lr * s.weight_decay
    for grad, param, mean, square in zip(grads, params, means, squares, strict=True):
        g, p, m, v = (one.to(torch.float32) for one in (grad, param, mean, square))
        if not s.decoupled and s.weight_decay:
            g = torch.add(g, p, alpha=s.weight_decay)
        m = torch.add(m * s.beta1, g, alpha=1 - s.beta1)
        v = torch.add(v * s.beta2, g * g, alpha=1 - s.beta2)
        update = m / (v.sqrt() / root + s.eps) * size
        p = (p * kept if s.decoupled and s.weight_decay else p) - update
        for computed, stored in ((p, param), (m, mean), (v, square)):
            stored.copy_(computed)


def adam_update(grads: Tensors, params: Tensors, means: Tensors, squares: Tensors, settings: AdamSettings) -> None:
    """One step, in place on params and both moments; 16-bit tensors are computed in float32 and rounded at the end.

    p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), m_hat and v_hat bias-corrected.
    """
    numbers: Sequence[torch.Tensor] | None = None
    for run in _runs(params):
        g, p, m, v = grads[run], params[run], means[run], squares[run]
        if not _one_pass(g, p, m, v, settings):
            numbers = numbers or settings.of_this_step(p[0])
            traced = p[0].device.type in TRACED_DEVICES
            (_traced if traced else _formula)(g, p, m, v, settings, numbers)


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Sequence[Tensors],
    lr: Scalar,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """[g, p, m, v]: one step; mode 0 is L2, 1 is AdamW. As in Apex the flag is not read: inf and NaN go through."""
    grads, params, means, squares = tensor_lists
    settings = AdamSettings(lr, beta1, beta2, epsilon, step, mode == 1, bool(bias_correction), weight_decay)
    adam_update(grads, params, means, squares, settings)


def multi_tensor_adam_capturable(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Sequence[Tensors],
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: torch.Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: torch.Tensor,
) -> None:
    """As multi_tensor_adam, for g * inv_scale (stored), lr and step as tensors; nothing changes if the flag is up."""
    grads, params, means, squares = tensor_lists
    settings = AdamSettings(lr, beta1, beta2, epsilon, step, mode == 1, bool(bias_correction), weight_decay)
    with undone_if(noop_flag == 1, grads, params, means, squares):
        torch._foreach_mul_(list(grads), inv_scale.reshape(()))
        adam_update(grads, params, means, squares, settings)
