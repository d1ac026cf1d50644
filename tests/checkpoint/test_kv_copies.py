"""Optimizer state of this backend's copies of key-value heads, in `torch`: more tensor-parallel ranks than heads."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Target
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.errors import UserError
from nxdt_nemo.testing import ours
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.parity import relative
from nxdt_nemo.testing.recipe import Layout as Run
from nxdt_nemo.testing.recipe import Recipe, transformer_fields

from .conftest import KINDS, assert_same, read

FILE, KV = "model_optim_rng.pt", "self_attention.linear_qkv.kv_weight"


def test_there_and_back(unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    source = unpacked("ll_td_tp2pp2")  # 8 heads, 4 groups
    convert(source, tmp_path / "copies", "torch", wanted=Target(Layout(tp=8, pp=2), kinds=KINDS))
    assert assert_same(read(source), read(tmp_path / "copies")) == 156
    convert(tmp_path / "copies", tmp_path / "back", "torch_dist", wanted=Target(Layout(tp=4), kinds=KINDS))
    assert assert_same(read(source), read(tmp_path / "back")) == 156


def test_copies_that_differ_are_refused(unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    convert(unpacked("ll_td_tp2pp2"), tmp_path / "copies", "torch", wanted=Target(Layout(tp=8), kinds=KINDS))
    path = next(tmp_path.glob(f"copies/*/mp_rank_03/{FILE}"))
    state = torch.load(path, weights_only=False)
    names = [name for name, tensor in state["model"].items() if tensor.dim() > 1]
    state["optimizer"]["optimizer"]["state"][names.index(f"decoder.layers.0.{KV}")]["exp_avg"].neg_()
    torch.save(state, path)
    with pytest.raises(UserError, match=rf"mp_rank_03.*exp_avg of decoder.layers.0.{KV} differs from its copy"):
        read(tmp_path / "copies")


def test_no_optimizer_has_a_flat_buffer_of_them(unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    wanted = Target(Layout(tp=8), kinds=KINDS, extra={"optimizer_format": "distrib_optim"})
    with pytest.raises(UserError, match=r"tp=8 for 4 key-value heads: .*; use torch_dist"):
        convert(unpacked("ll_td_tp2pp2"), tmp_path / "copies", "torch", wanted=wanted)


def arguments(recipe: Recipe, bias: bool, tp: int) -> argparse.Namespace:
    """What Megatron-LM keeps beside the weights, as far as it matters."""
    return argparse.Namespace(
        **transformer_fields(recipe),
        add_qkv_bias=bias,
        group_query_attention=True,
        swiglu=True,
        position_embedding_type="rope",
        untie_embeddings_and_output_weights=True,
        max_position_embeddings=recipe.seq,
        padded_vocab_size=recipe.vocab,
        tensor_model_parallel_size=tp,
    )


def leg(recipe: Recipe, bias: bool, layout: Run, steps: range, resume: Path | None, save: Path | None) -> list[float]:
    """Losses of this rank, which begins and ends with a file of its own, as Megatron-LM's `torch` has it."""
    import torch.distributed as dist

    name = f"mp_rank_{dist.get_rank():02d}"
    training = ours.set_up(recipe, None, layout, fields={"add_qkv_bias": bias})
    if resume is not None:
        state = torch.load(resume / name / FILE, weights_only=False)
        missing, further = training.model[0].load_state_dict(state["model"], strict=False)
        assert not [key for key in (*missing, *further) if "_extra_state" not in key]
        training.optimizer.load_state_dict(state["optimizer"])
    found = []
    for step in steps:
        found += ours.gradients_of(training, recipe, layout, step)
        ours.update(training.optimizer, recipe, step)
    if save is not None:
        (save / name).mkdir(parents=True)
        model = training.model[0].state_dict_for_save_checkpoint()
        said = arguments(recipe, bias, layout.tp)
        state = {"args": said, "checkpoint_version": 3.0, "iteration": steps.stop, "model": model}
        torch.save({**state, "optimizer": training.optimizer.state_dict()}, save / name / FILE)
    ours.forget_groups()
    return found


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All of a nested state, by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path: tensor for key, item in items for path, tensor in tensors(item, f"{name}/{key}").items()}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(("dtype", "bias"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_training_goes_on(dtype: Any, bias: bool, gloo: Callable[..., Any], tmp_path: Path) -> None:
    """This backend trains 2 key-value heads at TP 4, saves, and goes on at TP 4, by way of 1 too, and at 2."""
    recipe = replace(Recipe.of("llama", heads=8, kv_groups=2), steps=6, dtype=dtype)

    def run(tp: int, steps: range, resume: Path | None = None, save: Path | None = None) -> list[float]:
        done = gloo(tp, leg, recipe, bias, Run(tp=tp), steps, resume, save, init=ACTIVE, env=ACTIVE_ENV)
        return list(done[0])

    saved = tmp_path / "saved"
    whole, first = run(4, range(6)), run(4, range(3), save=saved)
    assert whole[: len(first)] == first
    for at, layouts in {"same": (4,), "by 1": (1, 4), "to 2": (2,)}.items():
        folder = saved
        for number, tp in enumerate(layouts):
            wanted = Target(Layout(tp=tp), kinds=KINDS, divisible_by=1)
            convert(folder, tmp_path / f"{at}{number}", "torch", wanted=wanted)
            folder = tmp_path / f"{at}{number}/iter_0000003"
        rest = run(layouts[-1], range(3, 6), folder)
        if layouts[-1] == 4:  # rank by rank what was saved, to the bit
            assert rest == whole[len(first) :], at
            for rank in range(4):
                one, other = (torch.load(f / f"mp_rank_{rank:02d}" / FILE, weights_only=False) for f in (saved, folder))
                mine, theirs = (tensors([state["model"], state["optimizer"]]) for state in (one, other))
                assert sum(name.endswith(KV) for name in mine) == recipe.layers
                assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
        elif dtype == "float32":
            assert relative(rest, whole[len(first) :]) <= 1e-6, at
    fresh = run(4, range(3, 6))  # the control
    assert relative(fresh, whole[len(first) :]) > 1e-3
