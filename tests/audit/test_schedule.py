"""Bytes that live at once: by hand on small graphs, and beside those of XLA:CPU's own schedule of a step."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.audit.hlo import Graph
from nxdt_nemo.audit.schedule import peak_bytes
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.recipe import Layout, Recipe
from nxdt_nemo.testing.traced import TRACED_ENV

K = 1024  # bytes of f32[256]


def peak(*lines: str) -> int:
    return peak_bytes(Graph("ENTRY %main {\n" + "\n".join(f"  {line}" for line in lines) + "\n}").operations)


def dot(name: str, shape: str, *operands: str) -> str:
    return f"%{name} = {shape} dot({', '.join(f'%{one}' for one in operands)}), lhs_contracting_dims={{0}}"


def test_a_product_that_frees_more_than_it_takes_is_made_early() -> None:
    """The text makes both wide ones before it adds up what is made of them, as torch_xla does with weight gradients."""
    found = peak(
        "%p = f32[256] parameter(0)",
        dot("wide.1", "f32[4,256]", "p", "p"),
        dot("wide.2", "f32[4,256]", "p", "p"),
        dot("small.1", "f32[256]", "wide.1", "p"),
        dot("small.2", "f32[256]", "wide.2", "p"),
        "ROOT %sum = f32[256] add(f32[256] %small.1, f32[256] %small.2)",
    )
    assert found == (1 + 1 + 4 + 1) * K  # the parameter, one small one, the other with what it is made of


def test_a_barrier_holds_back_what_is_made_again() -> None:
    """Were both wide products made at once, they would lie side by side."""
    found = peak(
        "%p = f32[256] parameter(0)",
        dot("wide.1", "f32[4,256]", "p", "p"),
        dot("small.1", "f32[256]", "wide.1", "p"),
        "%both = (f32[256], f32[256]) tuple(f32[256] %p, f32[256] %small.1)",
        "%barrier = (f32[256], f32[256]) opt-barrier((f32[256], f32[256]) %both)",
        "%again = f32[256] get-tuple-element((f32[256], f32[256]) %barrier), index=0",
        dot("wide.2", "f32[4,256]", "again", "again"),
        "ROOT %small.2 = f32[256] dot(f32[4,256] %wide.2, f32[256] %small.1), lhs_contracting_dims={0}",
    )
    assert found == (1 + 1 + 4 + 1) * K  # the first is gone


def test_elementwise_operations_take_the_place_of_what_they_read_or_none() -> None:
    found = peak(
        "%p = f32[256] parameter(0)",
        dot("a", "f32[4,256]", "p", "p"),
        "%b = f32[4,256] multiply(f32[4,256] %a, f32[4,256] %a)",
        "%c = f32[4,256] add(f32[4,256] %b, f32[4,256] %b)",
        dot("d", "f32[4,256]", "c", "p"),
        "%one = f32[] constant(1)",
        "%wide = f32[64,256] broadcast(f32[] %one), dimensions={}",
        "ROOT %sum = f32[256] reduce(f32[4,256] %d, f32[] %one), dimensions={0}",
    )
    assert found == (1 + 1 + 4 + 4) * K - K  # the sum has the parameter's place


# --- beside XLA:CPU ---------------------------------------------------------------------------------------------------

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
NEAR = 0.15
# Loops cut for as many threads as the machine has cores are other operations, and are scheduled otherwise.
DISABLED = "--xla_disable_hlo_passes=cse_barrier_expander,cpu-parallel-task-assigner"


def lowered_and_live(recipe: Recipe, fields: dict[str, Any], dump: str) -> tuple[str, int]:
    """A step's text, and the most bytes that live at once in XLA:CPU's schedule of it. Not those of its buffers: they
    have gaps, by where they happen to be packed."""
    import gc

    import torch
    import torch_xla

    from nxdt_nemo.testing.ours import gradients_of, set_up, update
    from nxdt_nemo.testing.pool import lane_here

    lane, text = lane_here(), ""
    training = set_up(recipe, None, Layout(), fields=fields)
    for step in range(2):
        lane.cut()
        lane.synchronize()
        kept = gradients_of(training, recipe, Layout(), step, read=lambda loss: loss.clone())
        kept.append(update(training.optimizer, recipe, step, read=lambda norm: norm))
        kinds = (torch.Tensor, torch.nn.Parameter)
        live = [one for one in gc.get_objects() if type(one) in kinds and one.device.type == "xla"]
        text = torch_xla._XLAC._get_xla_tensors_hlo(sorted(live, key=torch_xla._XLAC._xla_get_tensor_id))
        lane.step_boundary()
        lane.synchronize()
    last = max(Path(dump).glob("*buffer-assignment.txt"), key=os.path.getmtime)
    peak = last.read_text().partition("(peak):")[2].partition("Stack trace")[0]
    return text, int(re.findall(r"cumulative: (\d+) bytes", peak)[-1])


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("micro_batches", "fields"),
    [(1, {}), (2, FULL), (4, FULL)],
)
def test_it_is_near_what_lives_in_xlas_schedule(
    with_torch_xla: None, tmp_path: Path, micro_batches: int, fields: dict[str, Any]
) -> None:
    sizes = {"layers": 3, "hidden": 128, "seq": 256, "heads": 4, "kv_groups": 2, "ffn": 352, "vocab": 1024}
    recipe = Recipe.of("llama", micro_batch=1, micro_batches=micro_batches, **sizes)
    flags = f"--xla_dump_to={tmp_path} {DISABLED}"
    with RankPool(1, env=TRACED_ENV | {"XLA_FLAGS": flags}, init=ACTIVE, group=False, timeout=300) as pool:
        [(text, live)] = pool.run(lowered_and_live, recipe, fields, str(tmp_path))
    assert peak_bytes(Graph(text).operations) == pytest.approx(live, rel=NEAR)
