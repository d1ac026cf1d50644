"""The section `neuron:`."""

from __future__ import annotations

import pydantic
import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config import NeuronConfig, neuron_section
from nxdt_nemo.errors import ConfigError


def section(**keys):
    return neuron_section(OmegaConf.create({"neuron": keys, "trainer": {}}), place="a.yaml")


@pytest.mark.parametrize("cfg", [{}, {"neuron": None}, {"neuron": {}}, {"neuron": {"runtime": None}}])
def test_defaults(cfg):
    found = neuron_section(OmegaConf.create(cfg))
    assert (found.runtime, found.instance, found.strict_keys, found.devices()) == (None, None, False, ())


def test_values():
    found = section(runtime="xla", instance="trn2.48xlarge", strict_keys=True)
    assert (found.runtime, found.instance, found.strict_keys) == ("xla", "trn2.48xlarge", True)
    assert found.devices() == (64, 128)


def test_interpolations_are_resolved():
    cfg = OmegaConf.create({"kind": "trn1.2xlarge", "neuron": {"instance": "${kind}"}})
    assert neuron_section(cfg).devices() == (2,)


def test_it_is_frozen():
    with pytest.raises(pydantic.ValidationError):
        section().runtime = "cpu"


def test_a_number_in_quotation_marks_is_one():
    found = section(lnc="2", exec_timeout="100", bucket_size_collectives=" 512 ", vocab_size="7")
    assert (found.lnc, found.exec_timeout, found.bucket_size_collectives, found.vocab_size) == (2, 100, 512, 7)


def test_an_lnc_leaves_one_count():
    assert [section(instance="trn2.48xlarge", lnc=lnc).devices() for lnc in (1, 2)] == [(128,), (64,)]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"runtme": "cpu"}, "unknown key neuron.runtme; did you mean runtime?"),
        (
            {"zzz": 1},
            "unknown key neuron.zzz; its keys are " + ", ".join(NeuronConfig.model_fields),
        ),
        ({"neuron_rt_exec_timeout": 1}, "unknown key neuron.neuron_rt_exec_timeout; did you mean exec_timeout?"),
        (
            {"aync_exec_max_inflight_requests": 1},
            "unknown key neuron.aync_exec_max_inflight_requests; did you mean async_exec_max_inflight_requests?",
        ),
        (
            {"exec_timeout": -1},
            "neuron.exec_timeout=-1 is wrong (input should be greater than or equal to 0)",
        ),
        (
            {"environment": {"A": [1]}},
            "neuron.environment.A=[1] is wrong (input should be a valid string)",
        ),
        ({"alignment": {"dpo": {"kl_bta": 0.1}}}, "unknown key neuron.alignment.dpo.kl_bta; did you mean kl_beta?"),
        ({"lnc": "3"}, "neuron.lnc=3 is wrong (input should be 1 or 2)"),
        (
            {"bucket_size_collectives": 0},
            "neuron.bucket_size_collectives=0 is wrong (input should be greater than or equal to 1)",
        ),
        ({"vocab_size": 0}, "neuron.vocab_size=0 is wrong (input should be greater than or equal to 1)"),
        ({"runtime": "gpu"}, "neuron.runtime=gpu is not a lane; use auto, cpu, xla or neuron"),
        ({"strict_keys": "maybe"}, "neuron.strict_keys=maybe is wrong (input should be a valid boolean)"),
        (
            {"instance": "trn1.32xlarg"},
            "neuron.instance=trn1.32xlarg is not a known instance; did you mean trn1.32xlarge?",
        ),
        (
            {"instance": "p5"},
            "neuron.instance=p5 is not a known instance; "
            "use trn1.2xlarge, trn1.32xlarge, trn1n.32xlarge, trn2.3xlarge, trn2.48xlarge or trn2u.48xlarge",
        ),
    ],
)
def test_a_mistake_is_one_line(keys, line):
    with pytest.raises(ConfigError) as caught:
        section(**keys)
    assert str(caught.value) == f"a.yaml: {line}"


def test_a_word_is_not_a_section():
    with pytest.raises(ConfigError, match="neuron=cpu is not a section"):
        neuron_section(OmegaConf.create({"neuron": "cpu"}))
