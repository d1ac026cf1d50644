"""FLOPs by hand: against the paper's formula where the two speak of the same model."""

from __future__ import annotations

import pytest

from nxdt_nemo.audit.bounds import arriving, bounds
from nxdt_nemo.audit.formula import Decoder, count
from nxdt_nemo.audit.hlo import Collective
from nxdt_nemo.config.instances import instance

GPT3 = Decoder(96, 12288, 2048, 1, 96, 96, 128, 49152, False, 51200)


def test_a_gpt_has_the_papers_flops() -> None:
    """arXiv:2104.04473, section 5.1: 96 B s l h^2 (1 + s / 6h + V / 16 l h), with the layer's forward made twice; here
    without the MLP's second product the second time, which nothing reads."""
    b, s, n, h, v = 1, 2048, 96, 12288, 51200
    paper = 96 * b * s * n * h * h * (1 + s / (6 * h) + v / (16 * n * h))
    found = count(Decoder(**{**vars(GPT3), "recompute": "full", "recomputed_layers": n}))
    assert found.hardware + n * 2 * s * h * 4 * h == pytest.approx(paper, rel=1e-12)
    assert found.model == pytest.approx(count(GPT3).hardware)


def test_a_product_that_nothing_reads_is_not_made_again() -> None:
    """Of whole scores that are made again, the product with V."""
    again = count(Decoder(**{**vars(GPT3), "recompute": "selective", "recomputed_layers": 96}))
    assert again.hardware - again.model == pytest.approx(96 * 2 * 96 * 128 * 2048 * 2048)


def test_causal_blocks_make_half_of_the_scores_and_make_them_twice() -> None:
    whole, blocks = count(GPT3), count(Decoder(**{**vars(GPT3), "block": 512}))
    pairs, skipped = 2048 * 2048, 2048 * (2048 + 512) / 2
    product = 2 * 96 * 128
    assert whole.model - blocks.model == pytest.approx(96 * 6 * product * (pairs - skipped))
    assert blocks.hardware - blocks.model == pytest.approx(96 * product * skipped)


def test_a_window_leaves_out_keys_before_a_blocks_first_query_sees_any() -> None:
    """2048 queries in blocks of 512 that see 700 keys back: 512, 1024, 512 + 700 twice."""
    seen = Decoder(**{**vars(GPT3), "block": 512, "window": 700})
    assert seen.pairs == 512 * (512 + 1024 + 1212 + 1212)
    assert Decoder(**{**vars(GPT3), "block": 512, "window": 4095}).pairs == 2048 * (2048 + 512) / 2
    assert Decoder(**{**vars(GPT3), "seq": 700, "block": 512}).pairs == 512 * 512 + 188 * 700


def test_experts_and_parts_of_a_sequence() -> None:
    """Two experts of eight, and a shared one of half their size; four ranks that divide a sequence."""
    tokens, h = 2048, 12288
    experts = count(Decoder(**{**vars(GPT3), "experts": 2.5, "router": 8}))
    added = 96 * 3 * 2 * tokens * h * (1.5 * 2 * 49152 + 8)
    assert experts.model - count(GPT3).model == pytest.approx(added)
    assert count(Decoder(**{**vars(GPT3), "context": 4})).model == pytest.approx(count(GPT3).model / 4)


def test_without_a_formula_there_is_no_mfu() -> None:
    found = bounds(
        instance("trn2.48xlarge"), None, dtype="bfloat16", flops=1.0, model_flops=None, bytes_moved=1.0, rank=0,
        collectives=[],
    )  # fmt: skip
    assert found.mfu is None


def test_a_bound_is_a_quantity_over_a_rank_s_share_of_a_published_peak() -> None:
    trn2 = instance("trn2.48xlarge")
    core = trn2.core()
    inside, outside = (
        Collective("all-gather", "bf16", (tuple(range(8)), tuple(range(8, 16))), 1 << 30),
        Collective("all-reduce", "f32", ((0, 64),), 1 << 20),
    )
    found = bounds(
        trn2, None, dtype="bfloat16", flops=1e15, model_flops=8e14, bytes_moved=1e12, rank=0,
        collectives=[(inside, 10.0), (outside, 2.0)],
    )  # fmt: skip
    assert found.compute == 1e15 / core.flops["bfloat16"] and found.memory == 1e12 / core.hbm_bandwidth
    assert found.neuronlink == 10 * (1 << 29) / trn2.neuronlink and found.network == 2 * (1 << 20) / trn2.network
    assert found.by == "compute" and found.mfu == pytest.approx(0.8)


GIGABYTE = 10**9
NODE, TWO_NODES = tuple(range(64)), tuple(range(128))
ARRIVING = [  # kind, groups; ranks of a place; bytes that come to the place of rank 0, of a tensor of 1 GB
    ("all-gather", (tuple(range(4)),), 4, 0),  # one chip of trn2
    ("all-gather", (TWO_NODES,), 64, GIGABYTE / 2),  # once for all of a node's ranks
    ("all-reduce", (TWO_NODES,), 64, GIGABYTE),
    ("reduce-scatter", tuple((rank, 64 + rank) for rank in range(64)), 64, 64 * GIGABYTE / 2),  # a node is in 64 groups
    ("all-gather", (NODE, tuple(range(64, 128))), 4, GIGABYTE * 15 / 16),  # the other group is elsewhere
    ("all-to-all", (TWO_NODES,), 64, 64 * GIGABYTE / 2),  # each rank has its own
    ("collective-permute", ((0, 64), (64, 1), (65, 64), (2, 3)), 64, GIGABYTE),
]


@pytest.mark.parametrize(("kind", "groups", "size", "expected"), ARRIVING)
def test_links_carry_what_a_place_has_not(
    kind: str, groups: tuple[tuple[int, ...], ...], size: int, expected: float
) -> None:
    assert arriving(Collective(kind, "bf16", groups, GIGABYTE), size, 0) == expected


@pytest.mark.parametrize(("name", "seconds"), [("trn2.48xlarge", 1.25e-3), ("trn2u.48xlarge", 0.0)])
def test_a_gather_over_two_instances(name: str, seconds: float) -> None:
    """Instances of an UltraServer have NeuronLink between them."""
    found = bounds(
        instance(name), None, dtype="bfloat16", flops=1.0, model_flops=1.0, bytes_moved=1.0, rank=0,
        collectives=[(Collective("all-gather", "bf16", (TWO_NODES,), GIGABYTE), 1.0)],
    )  # fmt: skip
    assert found.network == seconds and (found.neuronlink == 0) == (seconds > 0)
