"""Named placements against the groups that NxD Core publishes: its docstrings and the tables of its own tests.

Published: neuronx_distributed/parallel_layers/parallel_state.py (the trn1 case's comment, get_logic_chosen) and
test/unit_test/parallel_layers/test_parallel_state.py (ground_truth_*). Its lists of groups of one rank are left out.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from nxdt_nemo.errors import LayoutError
from nxdt_nemo.megatron.parallel_state import meshes
from nxdt_nemo.runtime.placement import NAMES, Placement, asked, from_environment, placement


def span(first: int, last: int) -> list[int]:
    """A row of consecutive ranks, both ends in it."""
    return list(range(first, last + 1))


def pairs(*rows: tuple[list[int], list[int]]) -> list[list[int]]:
    return [[one, other] for left, right in rows for one, other in zip(left, right, strict=True)]


def sizes_of(world: int, tp: int, pp: int = 1, cp: int = 1, ep: int = 1) -> dict[str, int]:
    return {"tp": tp, "cp": cp, "ep": ep, "dp": world // (tp * pp * cp * ep), "pp": pp}


TRN1_64 = {
    "tp": [
        *([0, 8, 16, 24], [1, 9, 17, 25], [2, 10, 18, 26], [3, 11, 19, 27]),
        *([4, 12, 20, 28], [5, 13, 21, 29], [6, 14, 22, 30], [7, 15, 23, 31]),
        *([32, 40, 48, 56], [33, 41, 49, 57], [34, 42, 50, 58], [35, 43, 51, 59]),
        *([36, 44, 52, 60], [37, 45, 53, 61], [38, 46, 54, 62], [39, 47, 55, 63]),
    ],
    "dp": [
        [0, 1, 2, 3, 4, 5, 6, 7, 32, 33, 34, 35, 36, 37, 38, 39],
        [8, 9, 10, 11, 12, 13, 14, 15, 40, 41, 42, 43, 44, 45, 46, 47],
        [16, 17, 18, 19, 20, 21, 22, 23, 48, 49, 50, 51, 52, 53, 54, 55],
        [24, 25, 26, 27, 28, 29, 30, 31, 56, 57, 58, 59, 60, 61, 62, 63],
    ],
}
TRN2_NODE = [[*span(0, 15), *span(48, 63)], [*span(16, 31), *span(32, 47)]]
TRN2_TWO = [*TRN2_NODE, [*span(64, 79), *span(112, 127)], [*span(80, 95), *span(96, 111)]]
TRN2_FOUR = [
    *TRN2_TWO,
    [*span(128, 143), *span(176, 191)],
    [*span(144, 159), *span(160, 175)],
    [*span(192, 207), *span(240, 255)],
    [*span(208, 223), *span(224, 239)],
]
WITHIN_NODES = [  # the partner of a rank in the other half of its node: 48 comes before 32
    (span(0, 15), span(16, 31)),
    (span(48, 63), span(32, 47)),
    (span(64, 79), span(80, 95)),
    (span(112, 127), span(96, 111)),
    (span(128, 143), span(144, 159)),
    (span(176, 191), span(160, 175)),
    (span(192, 207), span(208, 223)),
    (span(240, 255), span(224, 239)),
]
NODE_TO_NODE = [
    (span(0, 15), span(64, 79)),
    (span(48, 63), span(112, 127)),
    (span(16, 31), span(80, 95)),
    (span(32, 47), span(96, 111)),
]
ACROSS_TWO = [
    (span(128, 143), span(192, 207)),
    (span(176, 191), span(240, 255)),
    (span(144, 159), span(208, 223)),
    (span(160, 175), span(224, 239)),
]
OVER_TWO = [  # pipelines over nodes 0 and 2, 1 and 3
    (span(0, 15), span(128, 143)),
    (span(48, 63), span(176, 191)),
    (span(16, 31), span(144, 159)),
    (span(32, 47), span(160, 175)),
    (span(64, 79), span(192, 207)),
    (span(112, 127), span(240, 255)),
    (span(80, 95), span(208, 223)),
    (span(96, 111), span(224, 239)),
]
PUBLISHED: list[tuple[str, int, dict[str, int], dict[str, list[list[int]]]]] = [
    ("trn1", 1, sizes_of(64, 4), TRN1_64),
    # (world 64, TP 32, PP 2), (128, TP 32, PP 2, DP 2), (128, TP 32, PP 2, CP 2), (256, TP 32, PP 2, DP 2, CP 2)
    ("trn2", 2, sizes_of(64, 32, pp=2), {"tp": TRN2_NODE, "pp": pairs(*WITHIN_NODES[:2])}),
    (
        "trn2",
        2,
        sizes_of(128, 32, pp=2),
        {"tp": TRN2_TWO, "dp": pairs(*WITHIN_NODES[:4]), "pp": pairs(*NODE_TO_NODE)},
    ),
    (
        "trn2",
        2,
        sizes_of(128, 32, pp=2, cp=2),
        {"tp": TRN2_TWO, "cp": pairs(*WITHIN_NODES[:4]), "pp": pairs(*NODE_TO_NODE)},
    ),
    (
        "trn2",
        2,
        sizes_of(256, 32, pp=2, cp=2),
        {
            "tp": TRN2_FOUR,
            "cp": pairs(*WITHIN_NODES),
            "dp": pairs(*NODE_TO_NODE, *ACROSS_TWO),
            "pp": pairs(*OVER_TWO),
        },
    ),
    # LNC 1 has 128 ranks a node, rows of 32
    (
        "trn2",
        1,
        sizes_of(128, 64),
        {
            "tp": [[*span(0, 31), *span(96, 127)], [*span(32, 63), *span(64, 95)]],
            "dp": pairs((span(0, 31), span(32, 63)), (span(96, 127), span(64, 95))),
        },
    ),
    ("trn2", 1, sizes_of(64, 64), {"tp": [[*span(0, 15), *span(48, 63), *span(16, 31), *span(32, 47)]]}),
]


@pytest.mark.parametrize(("name", "lnc", "sizes", "published"), PUBLISHED)
def test_published_groups(name: str, lnc: int, sizes: dict[str, int], published: dict[str, list[list[int]]]) -> None:
    place = placement(name, sizes, lnc=lnc)
    found = meshes(world_of(sizes), tp=sizes["tp"], pp=sizes["pp"], cp=sizes["cp"])
    assert {kind: place.mesh(found[kind]) for kind in published} == published


def world_of(sizes: dict[str, int]) -> int:
    result = 1
    for size in sizes.values():
        result *= size
    return result


@pytest.mark.parametrize(("name", "lnc", "sizes", "published"), PUBLISHED)
def test_each_rank_has_its_place(name: str, lnc: int, sizes: dict[str, int], published: Any) -> None:
    place, world = placement(name, sizes, lnc=lnc), world_of(sizes)
    assert sorted(place.physical(rank) for rank in range(world)) == list(range(world))
    assert place.physical(0) == 0  # the rank that writes and logs
    assert place.name == name and len(place.node) > 1


# get_logic_chosen: what it answers with ascending groups
ASCENDING = [
    ("trn1", 1, sizes_of(64, 8)),
    ("trn1", 2, sizes_of(64, 8)),
    ("trn1", 1, sizes_of(64, 32)),
    ("trn2", 1, sizes_of(128, 8)),
    ("trn2", 1, sizes_of(128, 32)),
    ("trn2", 1, sizes_of(128, 128)),
    ("trn2", 2, sizes_of(64, 4, pp=4)),
    ("trn2", 2, sizes_of(64, 16)),
    ("trn2", 2, sizes_of(64, 64)),
    ("trn2", 2, sizes_of(32, 32)),  # fewer than 64 ranks
    ("trn3", 1, sizes_of(64, 4)),
    ("trn3", 2, sizes_of(64, 32)),
    ("ascending", 1, sizes_of(64, 4)),
]


@pytest.mark.parametrize(("name", "lnc", "sizes"), ASCENDING)
def test_elsewhere_ranks_ascend(name: str, lnc: int, sizes: dict[str, int]) -> None:
    place = placement(name, sizes, lnc=lnc)
    assert place == Placement() and place.mesh([[3, 5], [7]]) == [[3, 5], [7]]


def test_a_launcher_may_start_fewer_ranks_on_a_node() -> None:
    assert placement("trn1", sizes_of(16, 4), node=8).mesh([[0, 1, 2, 3], [8, 9, 10, 11]]) == [
        [0, 2, 4, 6],
        [8, 10, 12, 14],
    ]


TP_PP_DP = {"tp": 4, "cp": 1, "ep": 1, "pp": 2, "dp": 8}
REFUSED: list[tuple[str, int, dict[str, int], int | None, str]] = [
    (
        "trn1",
        1,
        sizes_of(64, 4, ep=2),
        None,
        "NXDT_NEMO_PLACEMENT=trn1: expert_model_parallel_size=2 has no published placement beside "
        "tensor_model_parallel_size=4; use another tensor_model_parallel_size, or NXDT_NEMO_PLACEMENT=ascending",
    ),
    ("trn2", 2, sizes_of(128, 32, ep=2), None, "expert_model_parallel_size=2 has no published placement beside"),
    ("trn1", 1, TP_PP_DP, None, "the order tp-pp-dp of dimensions has no published placement; use the order tp-dp-pp"),
    ("trn1", 1, sizes_of(32, 4, pp=8), None, "data parallel size 1 is not a multiple of the 8 groups of"),
    ("trn1", 1, sizes_of(48, 4), None, "48 ranks in nodes of 32 are not whole nodes of whole groups of"),
    ("trn1", 1, sizes_of(12, 4), 6, "12 ranks in nodes of 6 are not whole nodes of whole groups of"),
    (
        "trn2",
        2,
        sizes_of(64, 8),
        None,
        "NXDT_NEMO_PLACEMENT=trn2: tensor_model_parallel_size=8 has no ring on trn2 at LNC 2: ranks 0 and 8 are not "
        "linked; use 4, 16, 32 or 64",
    ),
    ("trn2", 1, sizes_of(128, 16), None, "has no ring on trn2 at LNC 1: ranks 0 and 16 are not linked"),
    ("trn2", 2, sizes_of(96, 32), None, "96 ranks in nodes of 64 are not whole nodes"),
    ("trn2", 1, sizes_of(128, 64), 32, "128 ranks in nodes of 32 are not whole nodes of whole groups of"),
    ("trn2", 2, sizes_of(128, 32), 128, "a node of 128 ranks is not one or two groups of"),
]


@pytest.mark.parametrize(("name", "lnc", "sizes", "node", "text"), REFUSED)
def test_what_cannot_be_placed(name: str, lnc: int, sizes: dict[str, int], node: int | None, text: str) -> None:
    with pytest.raises(LayoutError) as error:
        placement(name, sizes, lnc=lnc, node=node)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert error.value.place == f"NXDT_NEMO_PLACEMENT={name}"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("NXDT_NEMO_PLACEMENT", "NEURON_LOGICAL_NC_CONFIG", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_environment_chooses(environment: pytest.MonkeyPatch) -> None:
    assert asked() == "ascending" and from_environment(sizes_of(64, 4)) == Placement()
    environment.setenv("NXDT_NEMO_PLACEMENT", "trn1")
    assert from_environment(sizes_of(64, 4)).mesh([[0, 1, 2, 3]]) == [[0, 8, 16, 24]]
    environment.setenv("LOCAL_WORLD_SIZE", "16")
    assert from_environment(sizes_of(64, 4)).mesh([[0, 1, 2, 3]]) == [[0, 4, 8, 12]]


@pytest.mark.parametrize(("lnc", "tp"), [(None, 32), ("2", 32), ("1", 64)])
def test_the_environment_says_how_many_cores_make_a_device(
    environment: pytest.MonkeyPatch, lnc: str | None, tp: int
) -> None:
    environment.setenv("NXDT_NEMO_PLACEMENT", "trn2")
    if lnc:
        environment.setenv("NEURON_LOGICAL_NC_CONFIG", lnc)
    rows = [from_environment(sizes_of(128, size)).node for size in (32, 64)]
    assert [len(node) > 1 for node in rows] == [tp == 32, tp == 64]


MISTAKES = [
    (
        {"NXDT_NEMO_PLACEMENT": "trn4"},
        "NXDT_NEMO_PLACEMENT: 'trn4' is not a placement; use ascending, trn1, trn2 or trn3",
    ),
    (
        {"NXDT_NEMO_PLACEMENT": "trn2", "NEURON_LOGICAL_NC_CONFIG": "4"},
        "NEURON_LOGICAL_NC_CONFIG: '4' is not a number of cores to a device; use 1 or 2",
    ),
]


@pytest.mark.parametrize(("variables", "text"), MISTAKES)
def test_a_wrong_variable(environment: pytest.MonkeyPatch, variables: dict[str, str], text: str) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(LayoutError) as error:
        from_environment(sizes_of(64, 4))
    assert str(error.value) == text
    assert all(name in NAMES for name in ("ascending", "trn1", "trn2", "trn3"))


def test_placements_are_plain_python() -> None:
    code = "import sys, nxdt_nemo.runtime.placement, nxdt_nemo.megatron.parallel_state; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
