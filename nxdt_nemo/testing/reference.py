"""The reference of every parity table: stock megatron-core on one CPU rank, trained by plain PyTorch.

Room testing/. Imports torch, megatron-core, nxdt_nemo.testing.recipe (data) and .families (upstream's constructors);
nothing else of ours, and the backend must not be active. Loop, clipping and optimizer are torch's own, so a mistake
that upstream's and our training loop share would show. Proof: tests/megatron/test_parity.py.

Run it with RankPool(1, env=STOCK_ENV): `pool.run("nxdt_nemo.testing.reference:train", recipe)`.
"""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nxdt_nemo.testing.families import build, config_of, losses_of, mean_of, stock_specs
from nxdt_nemo.testing.recipe import Batch, Recipe, micro_batches

if TYPE_CHECKING:
    import torch

__all__ = ["STOCK_ENV", "Trained", "initial_weights", "train"]

# torch.compile answers with the function itself: upstream's fused formulas, without compiling them
STOCK_ENV = {"TORCHDYNAMO_DISABLE": "1", "NXDT_NEMO": "0"}


@dataclass
class Trained:
    """What a run reports; all layouts in the names and shapes of the undivided model.

    losses, grad_norms  one a step; the loss is the mean over all tokens, summed in float64
    grads               step 1's gradients, reduced over all ranks, before clipping
    weights             after the last step
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    grads: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def initial_weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Upstream's own initialisation; biases and norms are shaken too, since zeros and ones hide a misplaced one."""
    import torch

    torch.manual_seed(recipe.seed)
    model = _stock_model(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=recipe.init_std)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(
    recipe: Recipe,
    weights: dict[str, torch.Tensor],
    batches: list[list[Batch]] | None = None,
    lrs: list[float] | None = None,
    decay: Literal["matrices", "all but biases"] = "matrices",
    steps: range | None = None,
    resume: Path | None = None,
    save: Path | None = None,
) -> Trained:
    """Train from these weights; batches[step] and lrs[step] replace the recipe's own.

    decay         what weight decay applies to: megatron-core spares vectors, NeMo 2.4 only biases (and Apex's own
                  norms, which no TransformerEngine layer is)
    steps         those of the recipe to make (default: all)
    resume, save  distributed checkpoints to begin with and to end with
    """
    import torch

    model = _stock_model(recipe)
    model.load_state_dict(weights, strict=False)
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.dim() > 1 if decay == "matrices" else not name.endswith("bias")].append(parameter)
    marks = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}  # megatron-core's
    decayed = {"params": groups[True], "weight_decay": recipe.weight_decay, "wd_mult": 1.0, **marks}
    spared = {"params": groups[False], "weight_decay": 0.0, "wd_mult": 0.0, **marks}
    optimizer = torch.optim.AdamW([decayed, spared], lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, foreach=False)
    if resume is not None:
        _load(model, optimizer, resume)
    trained = Trained()
    for step in range(recipe.steps) if steps is None else steps:
        parts = batches[step] if batches is not None else micro_batches(recipe, step)
        optimizer.zero_grad()
        trained.losses.append(sum(_forward_backward(model, recipe, batch, len(parts)) for batch in parts) / len(parts))
        if not trained.grads:
            trained.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        trained.grad_norms.append(_clip([p.grad for p in model.parameters() if p.grad is not None], recipe.clip))
        for group in optimizer.param_groups:
            group["lr"] = lrs[step] if lrs is not None else recipe.lr_at(step)
        optimizer.step()
    if save is not None:
        _save(model, optimizer, save)
    trained.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return trained


def _save(model: Any, optimizer: Any, folder: Path) -> None:
    """By megatron-core's own writer of a float32 model and its optimizer."""
    import torch
    from megatron.core import dist_checkpointing

    torch.cuda.synchronize = lambda *_: None  # it waits for a device
    folder.mkdir(parents=True)
    state = parameters_of(model)
    wanted = {"model": state, "optimizer": _upstreams(optimizer).sharded_state_dict(state)}
    dist_checkpointing.save(wanted, str(folder))


def _load(model: Any, optimizer: Any, folder: Path) -> None:
    """By megatron-core's own reader.

    It keeps the step beside torch's Adam's states. In files of FusedAdam the groups have it.
    """
    from megatron.core import dist_checkpointing

    state, upstreams = parameters_of(model), _upstreams(optimizer)
    wanted = {"model": state, "optimizer": upstreams.sharded_state_dict(state, is_loading=True)}
    found = dist_checkpointing.load(wanted, str(folder))
    states, groups = found["optimizer"]["state"], found["optimizer"]["param_groups"]
    if "common_step" not in states:
        states["common_step"] = float(groups[0]["step"])
    model.load_state_dict(found["model"], strict=False)
    upstreams.load_state_dict(found["optimizer"])


def parameters_of(model: Any) -> dict[str, Any]:
    """A model's sharded state dict without the empty states that are there for TransformerEngine's sake."""
    return {name: entry for name, entry in model.sharded_state_dict().items() if not name.endswith("_extra_state")}


def _upstreams(optimizer: Any) -> Any:
    """megatron-core's FP32Optimizer around an optimizer, as far as checkpoints need it."""
    import torch
    from megatron.core.optimizer.optimizer import FP32Optimizer

    def init_state(inner: Any, _: Any) -> None:
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            for name in ("exp_avg", "exp_avg_sq"):
                inner.state[parameter].setdefault(name, torch.zeros_like(parameter))

    made = FP32Optimizer.__new__(FP32Optimizer)  # its constructor makes a tensor on a CUDA device
    made.optimizer, made.config, made.init_state_fn, made.is_stub_optimizer = optimizer, None, init_state, False
    return made


def _forward_backward(model: Any, recipe: Recipe, batch: Batch, parts: int) -> float:
    """The micro-batch's loss; a mixture of experts adds its auxiliary losses' gradients by itself."""
    import torch
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0 / parts))
    seq = batch.tokens.shape[1]
    # Given, because upstream's default mask is made with device="cuda". True hides a position.
    mask = torch.ones(1, 1, seq, seq, dtype=torch.bool).triu(1)
    losses = losses_of(model, recipe, batch, torch.arange(seq), mask)
    (mean_of(losses, recipe, batch, losses.numel()) / parts).backward()
    return float(mean_of(losses.detach().double(), recipe, batch, losses.numel()))


def _clip(grads: list[torch.Tensor], limit: float) -> float:
    """Scale the gradients down to the limit; their norm before, summed in float64.

    torch.nn.utils.clip_grad_norm_ adds float32 squares one after the other on CPU: measured, 5e-6 too far from the
    true norm at 65 thousand elements and 6e-4 at 10 million, which is no yardstick for 1e-6.
    """
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    for grad in grads:
        grad.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def _stock_model(recipe: Recipe) -> Any:
    """A fresh model of upstream's local layers."""
    _stub_cuda()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if "apex" in sys.modules or "transformer_engine" in sys.modules:
        raise RuntimeError("the reference must be stock: apex or transformer_engine is loaded in this process")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(recipe.seed)
    return build(recipe, config_of(recipe), stock_specs)


def _stub_cuda() -> None:
    """The smallest stub with which stock layers build and run: the device, a stream, and a random state."""
    import torch

    stubs: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: "cpu"),
        (importlib.import_module("megatron.core.transformer.moe.moe_utils"), "te_general_gemm", None),  # left unbound
        (torch.cuda, "Stream", lambda *_, **__: None),  # a token dispatcher makes one, and uses it for CUDA only
        (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (torch.cuda.random, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
    ]
    for place, name, stub in stubs:
        setattr(place, name, stub)
