"""The rules that are data, and how check() and sanitise() put all rules together."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config import check, sanitise
from nxdt_nemo.config.keys import load
from nxdt_nemo.config.rules import rules
from nxdt_nemo.errors import ConfigError

CHANGES, IGNORED = rules()


def _with(cfg, key, value):
    OmegaConf.set_struct(cfg, False)
    OmegaConf.update(cfg, key, value)
    OmegaConf.set_struct(cfg, True)
    return cfg


@pytest.mark.parametrize("rule", CHANGES, ids=lambda rule: rule.key)
def test_a_value_that_cannot_stay_is_changed_and_listed(gpt, rule):
    value = rule.when[0] if rule.when else True
    cfg = _with(gpt(), rule.key, value)
    assert OmegaConf.is_struct(cfg)
    report = sanitise(cfg)
    assert [(c.old, c.new, c.why) for c in report.changes if c.key == rule.key] == [(value, rule.to, rule.why)]
    assert OmegaConf.select(cfg, rule.key) == rule.to
    assert OmegaConf.is_struct(cfg)


@pytest.mark.parametrize("rule", CHANGES, ids=lambda rule: rule.key)
def test_a_value_that_can_stay_is_not_listed(gpt, rule):
    report = check(_with(gpt(), rule.key, rule.to))
    assert [change for change in report.changes if change.key == rule.key] == []


def _unusual(key, stock):
    """A value of the kind of the stock ones."""
    if key.endswith("_size"):
        return 7
    if not stock or isinstance(stock[0], str):
        return "unusual"
    return not stock[0] if isinstance(stock[0], bool) else stock[0] + 7


@pytest.mark.parametrize("rule", [rule for rule in IGNORED if len(set(rule.stock)) < 2 or rule.stock[0] is not False])
def test_a_value_without_meaning_is_listed_and_stays(gpt, rule):
    unusual = _unusual(rule.key, rule.stock)
    cfg = _with(gpt(), rule.key, unusual)
    report = sanitise(cfg)
    assert report.errors == []
    assert report.ignored == [(rule.key, unusual, rule.instead)]
    assert OmegaConf.select(cfg, rule.key) == unusual


def test_stock_values_without_meaning_make_no_lines(gpt):
    cfg = gpt()
    for rule in IGNORED:
        for value in rule.stock:
            assert check(_with(cfg, rule.key, value)).ignored == []


@pytest.mark.parametrize("rule", [*CHANGES, *IGNORED], ids=lambda rule: rule.key)
def test_a_rule_is_about_a_key_that_nemo_reads(rule):
    assert load().knows(rule.key)


def test_no_key_has_two_rules():
    keys = [rule.key for rule in (*CHANGES, *IGNORED)]
    assert sorted(set(keys)) == sorted(keys)


def test_check_changes_nothing(gpt):
    cfg = gpt()
    before = OmegaConf.to_yaml(cfg)
    assert check(cfg).changes
    assert OmegaConf.to_yaml(cfg) == before


def test_a_second_sanitise_finds_nothing_to_change(gpt):
    cfg = gpt("trainer.precision=32", "model.transformer_engine=True")
    assert sanitise(cfg).changes
    after = OmegaConf.to_yaml(cfg)
    assert sanitise(cfg).changes == []
    assert OmegaConf.to_yaml(cfg) == after


def test_a_config_with_errors_stays_as_it_is(gpt):
    cfg = gpt("model.fp8=True")
    before = OmegaConf.to_yaml(cfg)
    report = sanitise(cfg)
    assert report.errors
    assert OmegaConf.to_yaml(cfg) == before


def test_the_model_section_alone(gpt):
    model = gpt("model.transformer_engine=True", "+model.seq_len_interpolation_facter=2").model
    report = sanitise(model, section="model", training=True)
    assert "model.transformer_engine" in [change.key for change in report.changes]
    assert model.transformer_engine is False
    assert [unknown.path for unknown in report.unknown] == ["model.seq_len_interpolation_facter"]


def test_a_wrong_model_section_alone(gpt):
    model = gpt("model.tensor_model_parallel_size=3").model
    (error,) = check(model, section="model").errors
    assert error.reason == "model.tensor_model_parallel_size=3 does not divide model.num_attention_heads=8"
    assert error.fix == "use 1, 2, 4 or 8"


def test_an_unknown_key_warns(gpt):
    report = check(gpt("+model.seq_len_interpolation_facter=2"), place="llama.yaml")
    line = "llama.yaml: unknown key model.seq_len_interpolation_facter; did you mean seq_len_interpolation_factor?"
    assert report.warnings == [line]
    assert report.errors == []


def test_an_unknown_key_is_an_error_with_strict_keys(gpt):
    report = check(gpt("+model.hiden_size=2", "+neuron.strict_keys=True"), place="llama.yaml")
    assert [str(error) for error in report.errors] == [
        "llama.yaml: unknown key model.hiden_size; did you mean hidden_size?"
    ]
    assert report.warnings == []


@pytest.mark.parametrize(
    ("instance", "devices", "says"),
    [
        ("trn1.32xlarge", "32", None),
        ("trn1.32xlarge", "2", "trainer.devices=2, but a trn1.32xlarge has 32 devices"),
        ("trn1.2xlarge", "[0,1]", None),
        ("trn2.48xlarge", "64", None),
        ("trn2.48xlarge", "128", None),
        ("trn2.48xlarge", "32", "trainer.devices=32, but a trn2.48xlarge has 64 or 128 devices"),
        ("trn1.32xlarge", "auto", None),
    ],
)
def test_devices_of_an_instance(gpt, instance, devices, says):
    report = check(gpt(f"+neuron.instance={instance}", f"trainer.devices={devices}"))
    assert report.warnings == ([says] if says else [])


CORES = [  # overrides, errors, warnings
    (("trainer.devices=128", "+neuron.lnc=2"),
     ["a.yaml: trainer.devices=128, and a trn2.48xlarge has 64 at neuron.lnc=2; set neuron.lnc=1"], []),
    (("trainer.devices=64", "trainer.num_nodes=2", "+neuron.lnc=1"), [],
     ["trainer.devices=64, but a trn2.48xlarge has 128 devices"]),
    (("trainer.devices=64", "+neuron.compiler_flags='--lnc 1'"),
     ["a.yaml: NEURON_CC_FLAGS has --logical-nc-config 1, and NEURON_LOGICAL_NC_CONFIG=2: compiler and runtime need "
      "the same; set neuron.lnc, and neither of them by hand"], []),
    (("trainer.devices=64", "+neuron.compiler_flags=O1"),
     ["a.yaml: neuron.compiler_flags: NEURON_CC_FLAGS=O1 is not options that begin with -"], []),
    (("trainer.devices=128", "+neuron.lnc=2", "+neuron.runtime=cpu"), [],
     ["trainer.devices=128, but a trn2.48xlarge has 64 devices"]),
]  # fmt: skip


def test_the_sdk_of_a_lane_that_is_named(gpt):
    assert check(gpt("+neuron.sdk='2.33'")).errors == []
    (error,) = check(gpt("+neuron.sdk='2.33'", "+neuron.runtime=xla")).errors
    assert str(error).startswith("the xla lane needs the Neuron SDK 2.27 to 2.29, not 2.33")


@pytest.mark.parametrize("overrides, errors, warnings", CORES)
def test_cores_of_a_rank(gpt, overrides, errors, warnings):
    report = check(gpt("+neuron.instance=trn2.48xlarge", *overrides), place="a.yaml")
    assert [str(error) for error in report.errors] == errors
    assert report.warnings == warnings


def test_raise_first(gpt):
    report = check(gpt("model.fp8=True", "model.tensor_model_parallel_size=3"))
    assert len(report.errors) == 2
    with pytest.raises(ConfigError) as caught:
        report.raise_first()
    assert caught.value is report.errors[0]
    check(gpt()).raise_first()


def test_a_key_that_lightning_2_refuses_gets_its_new_name():
    """As NeMo's megatron_gpt_validate_config.yaml has it, which restores a model and has no section for it."""
    trainer = {"devices": 1, "num_nodes": 1, "precision": 32, "replace_sampler_ddp": False}
    cfg = OmegaConf.create({"trainer": trainer, "gpt_model_file": "x.nemo"})
    OmegaConf.set_struct(cfg, True)
    report = sanitise(cfg)
    assert report.errors == []
    assert "trainer.replace_sampler_ddp" in [change.key for change in report.changes]
    assert "replace_sampler_ddp" not in cfg.trainer
    assert cfg.trainer.use_distributed_sampler is False
    assert sanitise(cfg).changes == []
