"""Which layers a stage has: the line for each mistake, and NxD Training's cuts as megatron-core's layout."""

from __future__ import annotations

import pytest

from nxdt_nemo.config import check, sanitise

PP = "model.pipeline_model_parallel_size"
VPP = "model.virtual_pipeline_model_parallel_size"
LAYOUT = "model.pipeline_model_parallel_layout"
CUTS = "model.pipeline_cuts"
FOUR = ["model.num_layers=4", f"{PP}=2"]


def layout(text: str) -> str:
    return f"+{LAYOUT}='{text}'"


def cuts(*layers: int) -> str:
    return f"+{CUTS}=[{','.join(f'model.layers.{layer}' for layer in layers)}]"


WRONG = [  # overrides, the line
    (
        [*FOUR, layout("Ett|ttL"), cuts(1)],
        f"{LAYOUT} with {CUTS}: both say which layers a stage has; use one of them",
    ),
    (
        [*FOUR, layout("Ett|ttL"), "+model.num_layers_in_first_pipeline_stage=2"],
        f"{LAYOUT} with model.num_layers_in_first_pipeline_stage: both say which layers a stage has; use one of them",
    ),
    (
        [*FOUR, layout("Ett|tL")],
        f"{LAYOUT}=Ett|tL has 3 layers of model.num_layers=4; "
        "begin with E, end with L, and have a t for each layer between them",
    ),
    (
        [*FOUR, layout("tt|ttL")],
        f"{LAYOUT}=tt|ttL has 4 layers of model.num_layers=4; "
        "begin with E, end with L, and have a t for each layer between them",
    ),
    (
        [*FOUR, layout("Ett|ttmL")],
        f"{LAYOUT}=Ett|ttmL: m (multi-token prediction) is not supported; use E, t, L and | as in Ett|tttL",
    ),
    ([*FOUR, layout("Ett|txL")], f"{LAYOUT}=Ett|txL: 'x' is not a layer; use E, t, L and | as in Ett|tttL"),
    (
        [*FOUR, layout("Et|t|ttL")],
        f"{LAYOUT}=Et|t|ttL has 3 parts for 2 stages and {VPP}=None; use a multiple of 2 parts",
    ),
    (
        [*FOUR, layout("(Et|)*1t|t|tL")],
        f"{LAYOUT}=(Et|)*1t|t|tL has 4 parts for 2 stages and {VPP}=None; use {VPP}=2",
    ),
    (
        [*FOUR, f"+{LAYOUT}=[[embedding,decoder],[decoder,loss]]"],
        f"{LAYOUT}=[['embedding', 'decoder'], ['decoder', 'loss']] is not a text; write it as Ett|tttL",
    ),
    (
        [*FOUR, f"+{CUTS}=[1]"],
        f"{CUTS}=[1] is not a list of layers; name the last layer of each stage: model.layers.1",
    ),
    (
        [*FOUR, cuts(0, 2)],
        f"{CUTS} has 2 cuts for 2 stages ({PP} x {VPP}); name the last layer of each stage but the last one: 1",
    ),
    (
        [*FOUR, cuts(3)],
        f"{CUTS}: layers [3] are not ascending between 0 and 2; "
        f"model.num_layers=4: leave each stage a layer, or use {LAYOUT}",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_a_mistake_is_one_line(errors, overrides, line):
    assert errors(*overrides) == [f"tiny_gpt.yaml: {line}"]


RIGHT = [
    [*FOUR, layout("E|ttttL")],
    [*FOUR, layout("Et*3|tL")],
    [*FOUR, layout("Et|(t|)*2,tL"), f"{VPP}=2"],
    ["model.num_layers=5", f"{PP}=2", layout("Ett|tttL")],
    ["model.num_layers=5", f"{PP}=2", "+model.num_layers_in_last_pipeline_stage=2"],
]


@pytest.mark.parametrize("overrides", RIGHT, ids=[" ".join(case) for case in RIGHT])
def test_what_megatron_core_takes_is_let_through(gpt, overrides):
    assert [str(error) for error in check(gpt(*overrides)).errors] == []


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([*FOUR, cuts(0)], "Et|tttL"),
        (["model.num_layers=7", f"{PP}=3", cuts(0, 4)], "Et|tttt|ttL"),
        ([*FOUR, f"{VPP}=2", cuts(0, 1, 2)], "Et|t|t|tL"),
    ],
)
def test_cuts_become_a_layout(gpt, overrides, text):
    """A layer that is named is the last one of its stage, as in NxD Core's pipeline/partition.py."""
    cfg = gpt(*overrides)
    report = sanitise(cfg)
    assert (report.errors, report.unknown) == ([], [])
    assert cfg.model.pipeline_model_parallel_layout == text
    assert cfg.model.pipeline_cuts is None
    assert [change.key for change in sanitise(cfg).changes] == []
