"""One variant of the xla lane's step benchmark: builds its Llama, then steps whenever a line arrives.

Started by tools/bench/xla_step.py as `worker.py VARIANT SETTING WEIGHTS [CHECKOUT]`; VARIANT "weights" writes the file.
Answers are those of tools/bench/turns.py.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[0] = str(ROOT)  # not this folder
sys.path.append(str(Path(__file__).resolve().parents[1]))

from turns import answer  # noqa: E402

from nxdt_nemo.testing.hugging_face import adamw  # noqa: E402
from nxdt_nemo.testing.recipe import Batch, Layout, Recipe, micro_batches  # noqa: E402

SETTINGS = {  # hidden size: what goes with it
    "128": {"layers": 4, "hidden": 128, "heads": 4, "kv_groups": 2, "ffn": 352, "seq": 128, "micro_batch": 2},
    "512": {"layers": 4, "hidden": 512, "heads": 8, "kv_groups": 4, "ffn": 1376, "seq": 256, "micro_batch": 1},
    "1024": {"layers": 4, "hidden": 1024, "heads": 16, "kv_groups": 8, "ffn": 2752, "seq": 256, "micro_batch": 2},
}

Step = Callable[[int], Callable[[], float]]
"""Hands a step over; what comes back waits for it and reads the loss."""


def recipe_of(setting: str) -> Recipe:
    """A Llama; steps is the length of the schedule only."""
    sizes: dict[str, Any] = SETTINGS[setting]
    return Recipe.of("llama", micro_batches=1, vocab=8192, steps=200, lr=2e-4, min_lr=2e-5, **sizes)


@functools.cache
def batches(recipe: Recipe, index: int) -> list[Batch]:
    """Made before the clock runs."""
    return micro_batches(recipe, index)


def ours(recipe: Recipe, weights: dict[str, Any]) -> Step:
    """This backend, on the lane that NXDT_NEMO_RUNTIME names."""
    import nxdt_nemo

    nxdt_nemo.activate()
    import torch

    from nxdt_nemo.runtime import current
    from nxdt_nemo.testing import ours as steps
    from nxdt_nemo.testing.ours import gradients_of, set_up, update

    steps.micro_batches = batches  # type: ignore[assignment]
    lane = current()
    lane.init_ranks(0, 1, store=torch.distributed.HashStore())
    training = set_up(recipe, weights, Layout())
    lane.cut()
    lane.synchronize()

    def step(index: int) -> Callable[[], float]:
        [loss] = gradients_of(training, recipe, Layout(), index, read=lambda loss: loss.clone())
        update(training.optimizer, recipe, index, read=lambda norm: norm)
        lane.step_boundary()

        def wait() -> float:
            lane.synchronize()
            return float(loss)

        return wait

    return step


def nxd(recipe: Recipe, weights: dict[str, Any]) -> Step:
    """NxD Core's library and example model, torch's AdamW."""
    import torch
    import torch_xla
    import torch_xla.core.xla_model as xm

    from xla_step_lib.nxd import load, model

    made = model(load(Path(sys.argv[4])), recipe, weights)
    from neuronx_distributed.parallel_layers import grads
    from neuronx_distributed.parallel_layers.loss_functions import parallel_cross_entropy

    parameters, optimizer = list(made.parameters()), adamw(made, recipe)
    torch_xla.sync()

    def step(index: int) -> Callable[[], float]:
        [batch] = batches(recipe, index)
        tokens, labels = (torch.from_numpy(one).to(torch_xla.device()) for one in (batch.tokens, batch.labels))
        optimizer.zero_grad()
        logits = made(input_ids=tokens).logits
        loss = parallel_cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1)).mean()
        loss.backward()
        grads.clip_grad_norm(parameters, recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(index)
        optimizer.step()
        kept = loss.detach()
        torch_xla.sync()

        def wait() -> float:
            xm.wait_device_ops()
            return float(kept)

        return wait

    return step


def products(recipe: Recipe, weights: dict[str, Any]) -> Step:
    """The matrix products of a step's linear layers and nothing else, one after the other, on the lane that is named.

    Three a weight: forward, for the input's gradient, for the weight's. No operand is transposed, which is the order
    that XLA:CPU multiplies fastest in.
    """
    import nxdt_nemo

    nxdt_nemo.activate()
    import torch

    from nxdt_nemo.runtime import current

    lane, tokens, pairs = current(), recipe.seq * recipe.micro_batch, []
    for name, weight in weights.items():
        if weight.dim() == 2 and "embedding" not in name:
            into, out = weight.shape
            for shapes in (
                ((tokens, out), (out, into)),
                ((tokens, into), (into, out)),
                ((into, tokens), (tokens, out)),
            ):
                pairs.append([torch.randn(shape).to(lane.device()) for shape in shapes])
    lane.cut()

    def step(index: int) -> Callable[[], float]:
        for a, b in pairs:
            _product = a @ b
            lane.cut()
        lane.synchronize()
        return lambda: 0.0

    return step


def graphs() -> int:
    """Compiled so far by torch_xla, 0 without it."""
    if not hasattr(sys.modules.get("torch_xla"), "__path__"):  # the cpu lane keeps it out
        return 0
    import torch_xla.debug.metrics as met

    return int((met.metric_data("CompileTime") or (0,))[0])


def serve(step: Step, recipe: Recipe) -> None:
    """Step once for each line of input."""
    answer({"ready": True})
    for index, _ in enumerate(sys.stdin):
        batches(recipe, index)
        before, began, busy = graphs(), time.perf_counter(), time.thread_time()
        wait = step(index)
        traced = time.thread_time()
        loss = wait()
        spent = {"step": time.perf_counter() - began, "tracing": traced - busy}
        answer({"loss": loss, "compiled": graphs() - before, **spent})


def main() -> None:
    variant, setting, path = sys.argv[1:4]
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    recipe = recipe_of(setting)
    if variant == "weights":
        from nxdt_nemo.testing.reference import initial_weights

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        save_file(initial_weights(recipe), path)
        return
    serve({"ours": ours, "nxd": nxd, "products": products}[variant](recipe, load_file(path)), recipe)


if __name__ == "__main__":
    main()
