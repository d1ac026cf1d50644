"""The key table: what it knows, what it suggests, and how tools/keys.py finds keys in source text."""

from __future__ import annotations

import ast
from collections import defaultdict
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config import names_in, unknown_keys
from nxdt_nemo.config.environment import variables
from nxdt_nemo.config.keys import load


@pytest.fixture(scope="module")
def tool(load_tool) -> ModuleType:
    return load_tool("keys")


def unknown(**cfg):
    return [str(key) for key in unknown_keys(OmegaConf.create(cfg))]


@pytest.mark.parametrize(
    "path",
    [
        "name",
        "trainer.devices",
        "trainer.max_steps",
        "exp_manager.resume_if_exists",
        "exp_manager.checkpoint_callback_params.save_top_k",
        "exp_manager.wandb_logger_kwargs.anything",
        "model.seq_len_interpolation_factor",
        "model.tp_comm_overlap_ag",  # a ModelParallelConfig field that no YAML has
        "model.moe_router_dtype",  # a TransformerConfig field that no YAML has
        "model.q_lora_rank",  # an MLATransformerConfig field
        "model.async_grad_allreduce",  # read by NeMo only
        "model.data.data_prefix.train",
        "model.data.train_ds.file_names",
        "model.optim.lr",
        "model.optim.bias_correction",
        "model.optim.sched.warmup_steps",
        "model.peft.lora_tuning.adapter_dim",
        "model.encoder.num_layers",
        "neuron.runtime",
    ],
)
def test_known(path):
    assert load().knows(path)


@pytest.mark.parametrize("path", ["num_layers", "model.lr", "model.optim.num_layers", "trainer.max_step", "optim.lr"])
def test_not_known(path):
    assert not load().knows(path)


@pytest.mark.parametrize(
    ("cfg", "line"),
    [
        (
            {"model": {"seq_len_interpolation_facter": 2}},
            "unknown key model.seq_len_interpolation_facter; did you mean seq_len_interpolation_factor?",
        ),
        ({"num_layers": 2}, "unknown key num_layers; did you mean model.num_layers?"),
        (
            {"trainer": {"micro_batch_size": 2}},
            "unknown key trainer.micro_batch_size; did you mean model.micro_batch_size?",
        ),
        ({"model": {"optim": {"wieght_decay": 2}}}, "unknown key model.optim.wieght_decay; did you mean weight_decay?"),
        ({"model": {"zzzz": {"deep": 1}}}, "unknown key model.zzzz; nothing reads it"),
        (
            {"model": {"num_kv_heads": 2}},
            "unknown key model.num_kv_heads; it is a key of neuronx-nemo-megatron, here model.num_query_groups",
        ),
        (
            {"distributed_strategy": {"zero1": True}},
            "unknown key distributed_strategy; it is a key of neuronx-distributed-training, here model",
        ),
    ],
)
def test_suggestion(cfg, line):
    assert unknown(**cfg) == [line]


def test_interpolations_and_missing_values_are_not_touched():
    assert unknown(name="${no.such}", model={"num_layers": "???", "hidden_size": "${nowhere:1}"}) == []


def test_keys_of_others_are_not_judged():
    model = {
        "data": {"data_prefix": {"train": [1]}},
        "tokenizer": {"special_tokens": {"mine": "<x>"}},
        "mcore_customization_config": {"window": 1},
        "restore_from_path": {"_target_": "a.B", "b": 1},
    }
    assert unknown(model=model, exp_manager={"wandb_logger_kwargs": {"tags": ["a"]}}) == []


def test_entries_of_a_list_are_looked_at():
    entry = {"file_names": ["a"], "fiel_names": ["b"]}
    assert unknown(model={"data": {"train_ds": [entry]}}) == [
        "unknown key model.data.train_ds.fiel_names; did you mean file_names?"
    ]


def test_every_suggestion_for_other_trainers_is_a_key_here():
    table = load()
    targets = {here for _, here in table.elsewhere.values() if here}
    assert [here for here in sorted(targets) if not table.knows(here)] == []
    assert [path for path in table.elsewhere if table.knows(path)] == []


def test_keys_of_nxd_training_are_named_by_their_place_under_neuron():
    """Those of the environment's table; below a section of theirs the section is unknown, and named."""
    table = load()
    theirs = {row.nxdt: f"neuron.{row.key}" for row in variables() if row.nxdt and row.key}
    said = {path: table.elsewhere[path][1] for path in theirs if path in table.elsewhere}
    assert said == {path: theirs[path] for path in said}
    assert set(theirs) - set(said) == {"precision.neuron_rt_stochastic_rounding_en", "model.fusions.softmax"}
    (line,) = unknown(compiler_flags="-O1")
    assert line == (
        "unknown key compiler_flags; it is a key of neuronx-distributed-training, here neuron.compiler_flags, where "
        "nxdt-nemo migrate moves it"
    )


def test_without_one_section_its_keys_are_free():
    table = load()
    sections = {section: names for section, names in table.sections.items() if section != "model"}
    assert unknown_keys(OmegaConf.create({"model": {"zzz": 1}}), table=replace(table, sections=sections)) == []


def test_names_in_a_script(tmp_path):
    script = tmp_path / "a.py"
    script.write_text("cfg.model.own\ncfg.get('other', 1)\nlocal = 1\n")
    assert {"own", "other", "model"} <= names_in(script)
    assert "local" not in names_in(script)
    script.write_text("def (")
    assert names_in(script) == frozenset()
    assert names_in(tmp_path / "none.py") == frozenset()


def test_keys_that_a_script_reads_are_known():
    cfg = OmegaConf.create({"own": 1, "other": 2})
    assert [key.path for key in unknown_keys(cfg, also=frozenset({"own"}))] == ["other"]


SOURCE = """
def f(self, cfg, data_cfg, optim_config):
    self.cfg.get('a', 1)
    cfg.b
    self._cfg.optim.get('c')
    cfg.trainer.d
    data_cfg['e']
    'g' in self.cfg
    getattr(cfg, 'h', None)
    (self.cfg.get('exp_manager', {}) or {}).get('i')
    optim_config.get('j')
    get_config_arg('k')
    self.cfg.items()
    cfg.name.lower()
    other.l
    cfg.pop(m)
"""


def test_tool_reads_keys_from_source(tool):
    found = defaultdict(set)
    for section, key in tool.reads(ast.parse(SOURCE), "model"):
        found[section].add(key)
    assert found == {
        "": {"trainer", "exp_manager"},
        "exp_manager": {"i"},
        "model": {"a", "b", "g", "h", "name", "optim"},
        "model.data": {"e"},
        "model.optim": {"c", "j", "k"},
        "trainer": {"d"},
    }


def test_tool_reads_classes(tool, tmp_path):
    file = tmp_path / "a.py"
    file.write_text("class A:\n    x: int = 1\n    y = 2\n    def __init__(self, u, *, v=1): ...\n")
    (node,) = tool.classes(file, "A")
    assert tool.fields(node) == {"x"}
    assert tool.arguments(node) == {"self", "u", "v"}
    assert list(tool.classes(file, "B")) == []


def test_tool_puts_a_fragment_where_it_is_included(tool, tmp_path):
    (tmp_path / "part.yaml").write_text("layers: 1\n")
    (tmp_path / "whole.yaml").write_text("defaults:\n  - .@model.encoder: part\ntrainer: {devices: 1}\n")
    found = defaultdict(set)
    tool.walk_stock(sorted(tmp_path.glob("*.yaml")), found)
    assert found == {"": {"trainer"}, "trainer": {"devices"}, "model": {"encoder"}, "model.encoder": {"layers"}}


def test_the_table_is_that_of_the_installed_release(tool):
    """A moved pin without `python tools/keys.py` fails here."""
    try:
        installed = {name: version(name) for name in load().versions}
    except PackageNotFoundError as error:
        pytest.skip(f"{error} is not installed")
    assert installed == load().versions
    for name, path, wanted, section in tool.DATACLASSES:
        for node in tool.classes(tool.installed(name, path), wanted):
            names = {key for key in tool.fields(node) if not key.startswith("_")}
            assert names <= load().sections[section]
