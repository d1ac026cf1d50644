"""`_target_`: what a configuration may have called."""

from __future__ import annotations

from omegaconf import OmegaConf

from nxdt_nemo.config.targets import targets
from nxdt_nemo.config.view import View


def found(cfg) -> list[str]:
    return [str(error) for error in targets(View(OmegaConf.create(cfg)))]


def test_one_of_another_package_is_refused_at_any_depth():
    for cfg in (
        {"_target_": "os.system"},
        {"model": {"x": {"_target_": "os.system"}}},
        {"model": {"x": [{"_target_": "os.system"}]}},
    ):
        (line,) = found(cfg)
        assert "_target_=os.system is not of nemo, megatron" in line


def test_a_name_that_begins_like_an_allowed_one_is_refused():
    assert found({"model": {"_target_": "nemo_evil.run"}})


def test_upstreams_own_are_allowed():
    assert (
        found({"model": {"_target_": "nemo.collections.common.tokenizers.X", "sched": {"_target_": "torch.optim.SGD"}}})
        == []
    )


def test_a_package_can_be_trusted():
    assert found({"neuron": {"targets": ["mine"]}, "model": {"_target_": "mine.Data"}}) == []
