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
        "%q = f32[256] parameter(1)",
        dot("wide.1", "f32[4,256]", "p", "p"),
        dot("wide.2", "f32[4,256]", "q", "p"),
        dot("small.1", "f32[256]", "wide.1", "p"),
        dot("small.2", "f32[256]", "wide.2", "p"),
        "ROOT %sum = f32[256] add(f32[256] %small.1, f32[256] %small.2)",
    )
    assert found == (2 + 1 + 4 + 1) * K  # the parameters, one small one, the other with what it is made of


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


def test_what_is_made_twice_is_made_once() -> None:
    """Cosines of the same angles, in two micro-batches."""
    angles = [
        "%p = f32[256] parameter(0)",
        "%q = f32[256] parameter(1)",
        *(f"%cos.{one} = f32[256] cosine(f32[256] %p)" for one in (1, 2)),
        *(dot(f"d.{one}.{two}", "f32[256]", f"cos.{one}", "q") for one in (1, 2) for two in (1, 2)),
        *(f"%sum.{one} = f32[256] add(f32[256] %d.{one}.1, f32[256] %d.{one}.2)" for one in (1, 2)),
        "ROOT %sum = f32[256] multiply(f32[256] %sum.1, f32[256] %sum.2)",
    ]
    twice = [
        line.replace("cosine(f32[256] %p)", "cosine(f32[256] %q)") if "%cos.2" in line else line for line in angles
    ]
    assert peak(*angles) == (2 + 1 + 1) * K  # parameters, cosines, a product that takes its sum's place
    assert peak(*twice) > peak(*angles)


def test_what_spreads_little_over_much_is_made_where_it_is_read() -> None:
    """Labels, compared with each row of the vocabulary, in forward and backward."""
    assert (
        peak(
            "%labels = f32[256] parameter(0)",
            "%rows = f32[16,256] iota(), iota_dimension=0",
            "%each = f32[16,256] broadcast(f32[256] %labels), dimensions={1}",
            "%same = pred[16,256] compare(f32[16,256] %each, f32[16,256] %rows), direction=EQ",
            "%first = f32[256] reduce(pred[16,256] %same), dimensions={0}, to_apply=%add",
            "%second = f32[256] reduce(pred[16,256] %same), dimensions={0}, to_apply=%max",
            "ROOT %sum = f32[256] add(f32[256] %first, f32[256] %second)",
        )
        == (1 + 2) * K
    )


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
    ("micro_batches", "fields", "part"),
    [(1, {}, 1.0), (2, {}, 0.7), (2, FULL, 1.0), (4, FULL, 1.0)],
)
def test_it_is_near_what_lives_in_xlas_schedule(
    with_torch_xla: None, tmp_path: Path, micro_batches: int, fields: dict[str, Any], part: float
) -> None:
    """Of several micro-batches without recomputation XLA:CPU keeps more than it would have to."""
    sizes = {"layers": 3, "hidden": 128, "seq": 256, "heads": 4, "kv_groups": 2, "ffn": 352, "vocab": 1024}
    recipe = Recipe.of("llama", micro_batch=1, micro_batches=micro_batches, **sizes)
    flags = f"--xla_dump_to={tmp_path} {DISABLED}"
    with RankPool(1, env=TRACED_ENV | {"XLA_FLAGS": flags}, init=ACTIVE, group=False, timeout=300) as pool:
        [(text, live)] = pool.run(lowered_and_live, recipe, fields, str(tmp_path))
    assert peak_bytes(Graph(text).operations) == pytest.approx(part * live, rel=NEAR)
