"""A sliding window of W tokens, transformers' `sliding_window`, is megatron-core's `window_size` (W - 1, 0), which does
not count the query's own. NeMo's converters write (W, 0), one key more than the model was trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.dtypes import FLOAT32
from nxdt_nemo.checkpoint.formats.base import Target
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.testing.recipe import Recipe, layout

from .conftest import SMALL, read

WINDOW, LENGTH = 64, 96


def megatron_logits(folder: Path, bounds: tuple[int, int], tokens: torch.Tensor) -> torch.Tensor:
    """Of megatron-core's GPT with our attention, of a `torch_dist` folder's weights."""
    from megatron.core import dist_checkpointing

    from nxdt_nemo.testing.ours import forget_groups, lane_here, set_up

    lane_here()
    recipe = Recipe.of("llama", vocab=1024, seq=LENGTH, ffn=SMALL["intermediate_size"])
    fields = {"window_size": bounds, "layernorm_epsilon": 1e-6}
    try:
        model = set_up(recipe, None, layout("one"), fields=fields).model[0].eval()
        wanted = model.sharded_state_dict()
        model.load_state_dict(dist_checkpointing.load(wanted, str(folder)), strict=False)
        with torch.no_grad():
            found: torch.Tensor = model(tokens, torch.arange(LENGTH)[None], None)
        return found
    finally:
        forget_groups()


@pytest.mark.slow
@pytest.mark.ranks
def test_logits_are_those_of_transformers(
    active: Callable[..., Any], hf_model: Callable[[str], Path], tmp_path: Path
) -> None:
    hf = hf_model("mistral")
    convert(hf, tmp_path / "dist", "torch_dist", wanted=Target(Layout(), FLOAT32))
    (common,) = (tmp_path / "dist").rglob("common.pt")
    tokens = torch.randint(0, SMALL["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(1))
    left, right = torch.load(common, weights_only=False)["args"].window_size
    ours, upstreams = (active(megatron_logits, common.parent, (left + more, right), tokens) for more in (0, 1))
    for way in ("eager", "sdpa"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(hf, attn_implementation=way).eval()
        with torch.no_grad():
            logits = theirs(tokens).logits
        wide = (upstreams[..., : logits.shape[-1]] - logits).abs()
        assert (ours[..., : logits.shape[-1]] - logits).abs().max() < 1e-5, way
        assert wide[:, :WINDOW].max() < 1e-5 < 1e-3 < wide[:, WINDOW:].max(), way


def test_the_window_of_each_format(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    hf = hf_model("mistral")
    for to, file in (("nemo", "model_config.yaml"), ("nemo2", "context/model.yaml")):
        convert(hf, tmp_path / to, to)
        config = yaml.safe_load((tmp_path / to / file).read_text())
        assert config.get("config", config)["window_size"] == [WINDOW - 1, 0]
        assert read(tmp_path / to, optimizer=False).model.window == WINDOW
