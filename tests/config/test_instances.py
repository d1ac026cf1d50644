"""The table of instances, against what AWS's pages say of whole instances (the rows themselves are of chips)."""

from __future__ import annotations

import pytest

from nxdt_nemo.config.instances import INSTANCES, instance
from nxdt_nemo.errors import ConfigError

GIB, GB, TB, TFLOP, GBIT = 2**30, 1e9, 1e12, 1e12, 1e9 / 8

# instance           cores  HBM GiB  HBM B/s    BF16 TFLOPS  FP32    NeuronLink a chip  network    all of it
WHOLE = [
    ("trn1.2xlarge", 2, 32, 0.82 * TB, 190, 47.5, 0, 12.5 * GBIT),
    ("trn1.32xlarge", 32, 512, 13.12 * TB, 3_040, 760, 384 * GB, 800 * GBIT),
    ("trn1n.32xlarge", 32, 512, 13.12 * TB, 3_040, 760, 768 * GB, 1_600 * GBIT),
    ("trn2.3xlarge", 4, 96, 2.9 * TB, 667, 181, 0, 200 * GBIT),
    ("trn2.48xlarge", 64, 1_536, 46.4 * TB, 10_672, 2_896, 1_024 * GB, 3_200 * GBIT),
    ("trn2u.48xlarge", 64, 1_536, 46.4 * TB, 10_672, 2_896, 1_024 * GB, 3_200 * GBIT),
]


@pytest.mark.parametrize("name, cores, hbm, bandwidth, bf16, fp32, link, network", WHOLE, ids=[w[0] for w in WHOLE])
def test_shares_add_up_to_the_instance(name, cores, hbm, bandwidth, bf16, fp32, link, network):
    found = INSTANCES[name]
    assert found.cores() == cores
    for lnc in found.chip.lnc:
        core, number = found.core(lnc), found.cores(lnc)
        assert core.hbm * number == hbm * GIB
        assert core.hbm_bandwidth * number == pytest.approx(bandwidth)
        assert core.flops["bfloat16"] * number == pytest.approx(bf16 * TFLOP)
        assert core.flops["float32"] * number == pytest.approx(fp32 * TFLOP)
        assert core.neuronlink * number == pytest.approx(link * found.chips)
        assert core.network * number == pytest.approx(network)


def test_one_rank_of_trn2():
    found = INSTANCES["trn2.48xlarge"]
    assert found.core().hbm == 24 * GIB
    assert found.core(1).hbm == 12 * GIB
    assert found.ranks == (64, 128)
    assert [found.lnc_of(ranks) for ranks in (64, 128, 32)] == [2, 1, None]


def test_every_row_names_its_pages():
    for found in INSTANCES.values():
        pages = f"{found.source}, {found.chip.source}".split(", ")
        assert all(page.startswith("https://") and page.endswith(".html") for page in pages)


def test_an_lnc_that_the_chip_has_not():
    with pytest.raises(ConfigError) as caught:
        INSTANCES["trn1.32xlarge"].cores(2)
    assert str(caught.value) == "neuron.lnc=2 on trn1.32xlarge; Trainium has LNC 1"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("trn2.48xlarg", "--target: trn2.48xlarg is not a known instance; did you mean trn2.48xlarge?"),
        (
            "p5",
            "--target: p5 is not a known instance; "
            "use trn1.2xlarge, trn1.32xlarge, trn1n.32xlarge, trn2.3xlarge, trn2.48xlarge or trn2u.48xlarge",
        ),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, line):
    with pytest.raises(ConfigError) as caught:
        instance(name, place="--target")
    assert str(caught.value) == line
