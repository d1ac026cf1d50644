"""One variant of the step benchmark: builds its model, then steps whenever a line arrives.

Started by tools/bench/step.py as `worker.py VARIANT FAMILY SETTING WEIGHTS`; VARIANT "weights" writes the file.
Answers are those of tools/bench/turns.py.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[0] = str(ROOT)  # not this folder
sys.path.append(str(Path(__file__).resolve().parents[1]))

from turns import answer  # noqa: E402

from nxdt_nemo.testing.hugging_face import adamw, llama_config, llama_weights  # noqa: E402
from nxdt_nemo.testing.recipe import Recipe, micro_batches  # noqa: E402

# By tokens a step: a small model of usual proportions, in one micro-batch, and with accumulation.
SHAPES = {
    "256": {"seq": 256, "micro_batch": 1, "micro_batches": 1},
    "512": {"seq": 512, "micro_batch": 1, "micro_batches": 1},
    "1024": {"seq": 1024, "micro_batch": 1, "micro_batches": 1},
    "4 x 512": {"seq": 512, "micro_batch": 2, "micro_batches": 2},
}


def recipe_of(family: Any, setting: str) -> Recipe:
    """hidden 512, 8 layers, 8 heads; steps is the length of the schedule only."""
    ffn = 2048 if family == "gpt" else 1376
    sizes = {"layers": 8, "hidden": 512, "heads": 8, "kv_groups": 8, "ffn": ffn, "vocab": 32000}
    return Recipe.of(family, **sizes, steps=200, lr=2e-4, min_lr=2e-5, **SHAPES[setting])


class Side:
    """A model with its losses, its clipping and its optimizer."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def zero(self) -> None:
        """Before a step."""

    def loss(self, tokens: Any, labels: Any) -> Any:
        """Mean loss of one micro-batch [b, s], with a graph."""

    def update(self, lr: float) -> None:
        """Clip and step."""


class Plain(Side):
    """Plain PyTorch around any model: what megatron-core without Apex and Hugging Face's Trainer do by default."""

    def __init__(self, recipe: Recipe, model: Any) -> None:
        super().__init__(recipe)
        self.model, self.parameters = model, [p for p in model.parameters() if p.requires_grad]
        self.optimizer = adamw(model, recipe)

    def zero(self) -> None:
        self.optimizer.zero_grad()

    def update(self, lr: float) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


class Stock(Plain):
    """megatron-core's local layers, as they are."""

    def __init__(self, recipe: Recipe, weights: dict[str, Any]) -> None:
        import torch

        from nxdt_nemo.testing.reference import _stock_model

        model = _stock_model(recipe)
        model.load_state_dict(weights, strict=False)
        super().__init__(recipe, model)
        self.positions = torch.arange(recipe.seq).expand(recipe.micro_batch, -1)
        self.mask = torch.ones(1, 1, recipe.seq, recipe.seq, dtype=torch.bool).triu(1)

    def loss(self, tokens: Any, labels: Any) -> Any:
        return self.model(tokens, self.positions, self.mask, labels=labels).mean()


class Transformers(Plain):
    """LlamaForCausalLM with SDPA attention."""

    def __init__(self, recipe: Recipe, weights: dict[str, Any]) -> None:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(llama_config(recipe, attn_implementation="sdpa"))
        model.load_state_dict(dict(llama_weights(weights, recipe)))
        super().__init__(recipe, model.train())

    def loss(self, tokens: Any, labels: Any) -> Any:
        logits = self.model(tokens).logits
        return self.model.loss_function(logits, None, self.recipe.vocab, shift_labels=labels)


class Ours(Side):
    """The backend's layers, megatron-core's gradient buffers and optimizer as the backend has them."""

    def __init__(self, recipe: Recipe, weights: dict[str, Any]) -> None:
        import nxdt_nemo

        nxdt_nemo.activate()
        import torch

        from nxdt_nemo.runtime import current
        from nxdt_nemo.testing import ours
        from nxdt_nemo.testing.recipe import Layout

        super().__init__(recipe)
        current().init_ranks(0, 1, store=torch.distributed.HashStore())
        training = ours.set_up(recipe, weights, Layout())
        [self.chunk], self.optimizer = training.chunks, training.optimizer
        self.positions = torch.arange(recipe.seq).expand(recipe.micro_batch, -1)

    def zero(self) -> None:
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def loss(self, tokens: Any, labels: Any) -> Any:
        return self.chunk(tokens, self.positions, None, labels=labels).mean()

    def update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.recipe.weight_decay * group["wd_mult"]
        self.chunk.finish_grad_sync()
        self.optimizer.step()


def serve(side: Side) -> None:
    """Step once for each line of input."""
    import torch

    recipe = side.recipe
    answer({"variant": type(side).__name__})
    for step, _ in enumerate(sys.stdin):
        batches = [(torch.from_numpy(b.tokens), torch.from_numpy(b.labels)) for b in micro_batches(recipe, step)]
        marks = [clock()]
        losses = forward_backward(side, batches)
        marks.append(clock())
        side.update(recipe.lr_at(step))
        marks.append(clock())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"loss": sum(losses) / len(losses), "peak_mb": peak}
        for index, kind in enumerate(("", " cpu")):
            first, second, third = (mark[index] for mark in marks)
            found |= {
                "step" + kind: third - first,
                "forward and backward" + kind: second - first,
                "clip and AdamW" + kind: third - second,
            }
        answer(found)


def forward_backward(side: Side, batches: list[tuple[Any, Any]]) -> list[float]:
    """Gradients of the mean over all micro-batches; their losses."""
    side.zero()
    losses = []
    for tokens, labels in batches:
        loss = side.loss(tokens, labels)
        (loss / len(batches)).backward()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main() -> None:
    variant, family, setting, path = sys.argv[1:]
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    if variant not in ("ours", "transformers"):  # ours brings its rank up itself
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    recipe = recipe_of(family, setting)
    if variant == "weights":
        from nxdt_nemo.testing.reference import initial_weights

        save_file(initial_weights(recipe), path)
        return
    sides: dict[str, Callable[..., Side]] = {"ours": Ours, "transformers": Transformers}
    serve(sides.get(variant, Stock)(recipe, load_file(path)))


if __name__ == "__main__":
    main()
