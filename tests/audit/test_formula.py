"""FLOPs by hand: against the paper's formula where the two speak of the same model."""

from __future__ import annotations

import pytest

from nxdt_nemo.audit.bounds import bounds
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


def test_a_bound_is_a_quantity_over_a_rank_s_share_of_a_published_peak() -> None:
    trn2 = instance("trn2.48xlarge")
    core = trn2.core()
    inside, outside = (
        Collective("all-gather", "bf16", ((0, 1),), 1 << 30),
        Collective("all-reduce", "f32", ((0, 64),), 1 << 20),
    )
    found = bounds(
        trn2, None, dtype="bfloat16", flops=1e15, model_flops=8e14, bytes_moved=1e12, rank=0,
        collectives=[(inside, 10.0), (outside, 2.0)],
    )  # fmt: skip
    assert found.compute == 1e15 / core.flops["bfloat16"] and found.memory == 1e12 / core.hbm_bandwidth
    assert found.neuronlink == 10 * (1 << 29) / core.neuronlink and found.network == 2 * (1 << 20) / core.network
    assert found.by == "compute" and found.mfu == pytest.approx(0.8)
