"""A whole configuration on its way: text, references, parts, targets, overrides, and the second time."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config.migrate import Options, migrate
from nxdt_nemo.config.migrate.engine import dialect_of, parse_overrides
from nxdt_nemo.config.migrate.tree import Document
from nxdt_nemo.errors import UserError

SMALL = Path(__file__).with_name("data").joinpath("small_nxdt.yaml").read_text()


def values(text):
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


def entry(report, key):
    (found,) = [one for one in report.entries if one.key == key]
    return found


def test_comments_order_and_references():
    found = migrate(SMALL, place="small.yaml")
    lines = [line.strip() for line in found.text.splitlines()]
    for line in (
        "# A small configuration as NxD Training's users write it; made up for these tests.",
        "max_steps: 3 # short",
        "tensor_model_parallel_size: 2 # within a chip",
        "num_query_groups: 2 # grouped queries",
        "async_save: False # not yet",
        "seed: 1234 # for everything",
        "# where the text is",
        "model_parallel_size: ${multiply:${model.tensor_model_parallel_size}, ${model.pipeline_model_parallel_size}}",
        "max_position_embeddings: ${.encoder_seq_length}",
        "seq_length: ${model.encoder_seq_length}",
        "layernorm_epsilon: 1e-5",
        "filename: 'small--{step}-{consumed_samples}'",
    ):
        assert line in lines, line
    keys = list(values(found.text)["model"])
    assert keys.index("encoder_seq_length") < keys.index("num_layers") < keys.index("optim") < keys.index("data")


def test_every_key_is_reported_once():
    found = migrate(SMALL)
    keys = [node.path for node in Document(SMALL).nodes() if not node.is_section]
    told = [one.key for one in found.report.entries if one.key]
    assert sorted(told) == sorted(keys)
    assert all(one.why for one in found.report.entries if one.action == "dropped")


def test_a_section_in_braces_is_read_as_one_below_its_key():
    import yaml

    sections = yaml.safe_load(SMALL)
    lines = [f"{key}: {yaml.safe_dump(value, default_flow_style=True, width=99999)}" for key, value in sections.items()]
    found, plain = migrate("".join(lines).replace("\n...\n", "\n")), migrate(SMALL)
    assert values(found.text) == values(plain.text)
    assert {one.key: one.action for one in found.report.entries} == {
        one.key: one.action for one in plain.report.entries
    }


@pytest.mark.parametrize("options", [Options(), Options(target="trn2.48xlarge", nodes=4), Options(target="cpu")])
def test_the_second_time_changes_nothing(options):
    once = migrate(SMALL, options)
    again = migrate(once.text, options)
    assert again.text == once.text
    assert again.report.dialect == "nemo"
    assert [one for one in again.report.entries if one.action != "kept"] == []


def test_a_migrated_file_has_what_it_should():
    model = values(migrate(SMALL).text)["model"]
    assert model["mcore_gpt"] is True
    assert model["optim"]["name"] == "mcore_distributed_optim"
    assert values(migrate(SMALL).text)["neuron"]["bucket_size_collectives"] == 1024
    assert "capturable" not in model["optim"]
    assert model["recompute_modules"] == ["core_attn"]
    assert model["tokenizer"]["library"] == "sentencepiece"
    assert model["virtual_pipeline_model_parallel_size"] is None
    assert "distributed_strategy" not in values(migrate(SMALL).text)


def test_hydras_defaults_stay_and_bring_their_keys():
    text = (
        "defaults:\n  - .@model.encoder: base # theirs\n  - .@model.decoder: base\n\nname: t5\ntrainer:\n"
        "  accelerator: gpu\nmodel:\n  encoder:\n    num_layers: 2\n  optim:\n    name: fused_adam\n"
    )
    found = migrate(text)
    assert found.text.startswith(text.partition("name")[0])
    assert values(found.text)["model"]["mcore_t5"] is True
    assert migrate(found.text).text == found.text


def test_a_part_that_hydra_includes_is_read_as_a_models():
    found = migrate("# half a model\nnum_layers: 2\nhidden_size: 8\nonnx_safe: False\nkv_channels: null\n")
    assert found.text == "# half a model\nnum_layers: 2\nhidden_size: 8\nkv_channels: null\n"
    other = "mine: 1\nyours: [2]\n"
    assert migrate(other).text == other


@pytest.mark.parametrize(
    "text, dialect",
    [
        ("distributed_strategy: {zero1: True}\n", "nxdt"),
        ("model:\n  wrap_with_zero: False\n", "nnm"),
        ("trainer:\n  accelerator: tpu\n", "nnm"),
        ("trainer:\n  accelerator: gpu\nmodel:\n  mcore_gpt: True\n", "nemo"),
        ("trainer:\n  replace_sampler_ddp: False\n", "nemo"),
    ],
)
def test_dialects(text, dialect):
    assert dialect_of(Document(text)) == dialect


def test_a_target():
    found = values(migrate(SMALL, Options(target="trn1.32xlarge", nodes=4)).text)
    assert (found["trainer"]["devices"], found["trainer"]["num_nodes"]) == (32, 4)
    assert found["neuron"]["instance"] == "trn1.32xlarge"
    assert values(migrate(SMALL, Options(target="cpu")).text)["neuron"]["runtime"] == "cpu"


@pytest.mark.parametrize(
    "options, line",
    [
        (Options(target="trn9"), "--target trn9: is no target; use trn1.32xlarge, trn2.48xlarge or cpu"),
        (Options(dialect="gpu"), "--from gpu: is no dialect; use auto, nemo, nnm or nxdt"),
    ],
)
def test_wrong_options_are_one_line(options, line):
    with pytest.raises(UserError, match=line):
        migrate(SMALL, options)


def test_an_unknown_key_stays_with_a_suggestion():
    found = migrate("trainer:\n  devices: 1\nmodel:\n  num_layerz: 2 # mine\n  seed: 1\n")
    assert "num_layerz: 2 # mine" in found.text
    said = entry(found.report, "model.num_layerz")
    assert (said.action, said.level, said.why) == ("unknown", "warning", "did you mean num_layers?")


def test_a_reference_to_what_is_gone_becomes_its_value():
    text = "distributed_strategy:\n  zero1: True\nmodel:\n  moe:\n    dropout: 0.0\n"
    text += "  hidden_dropout: ${model.moe.dropout}\n"
    assert values(migrate(text).text)["model"]["hidden_dropout"] == 0.0


def test_two_keys_for_one():
    found = migrate("distributed_strategy:\n  zero1: False\nmodel:\n  num_kv_heads: 2\n  num_query_groups: 4\n")
    assert values(found.text)["model"]["num_query_groups"] == 4
    assert entry(found.report, "model.num_kv_heads").level == "warning"


def test_overrides_are_of_the_files_own_keys_or_nemos():
    words = [
        "precision.type=fp32",
        "model.micro_batch_size=1",
        "+model.seq_len_interpolation_factor=2",
        "model.num_layers=4",
    ]
    found = migrate(SMALL, Options(overrides=parse_overrides(words)))
    said = values(found.text)
    assert said["trainer"]["precision"] == 32
    assert said["model"]["megatron_amp_O2"] is False
    assert said["model"]["micro_batch_size"] == 1
    assert said["model"]["num_layers"] == 4
    assert [(one.key, one.text) for one in found.rest] == [("model.seq_len_interpolation_factor", "2")]
    assert entry(found.report, "data.micro_batch_size").to == "model.micro_batch_size"


def test_overrides_are_read_and_merged_as_hydra_does():
    words = ["data={train_dir:/x,micro_batch_size:3}", "model.optim={}", "+model.own={a:'1',b:[x,'y, z']}", "seed=1e3"]
    found = migrate(SMALL, Options(overrides=parse_overrides(words)))
    said, before = values(found.text), values(migrate(SMALL).text)
    assert said["model"]["micro_batch_size"] == 3
    assert said["model"]["data"]["data_prefix"] == {"train": ["/x"]}
    assert said["model"]["global_batch_size"] == before["model"]["global_batch_size"]
    assert said["model"]["optim"] == before["model"]["optim"]
    assert said["model"]["seed"] == 1000.0
    assert [(one.key, one.text) for one in found.rest] == [("model.own.a", "'1'"), ("model.own.b", "[x,'y, z']")]


@pytest.mark.parametrize(
    "word, line",
    [
        ("fast", "fast: is no override; write key=value"),
        ("model.data.data_prefix=[a,", "model.data.data_prefix=[a,: cannot be read as an override; close brackets"),
        ("a=1,2", "a=1,2: is a sweep, and this is one run; write a list in brackets"),
    ],
)
def test_what_is_no_override_is_one_line(word, line):
    with pytest.raises(UserError) as caught:
        parse_overrides([word])
    assert str(caught.value).startswith(line)


def test_the_result_is_checked():
    wrong = SMALL.replace("num_attention_heads: 4", "num_attention_heads: 3")
    assert migrate(SMALL).report.errors == []
    assert any("does not divide model.num_attention_heads=3" in line for line in migrate(wrong).report.errors)


@pytest.mark.parametrize("value, written", [("16", "bf16"), ("'16-mixed'", "bf16-mixed"), ("bf16", "bf16"), ("32", 32)])
def test_half_precision_of_nemo(value, written):
    found = migrate(f"trainer:\n  accelerator: gpu # ours\n  precision: {value}\nmodel:\n  mcore_gpt: True\n")
    assert values(found.text)["trainer"] == {"accelerator": "neuron", "precision": written}
    assert "# ours" in found.text


def test_without_meaning_is_dropped_and_what_the_backend_maps_is_kept():
    text = "trainer:\n  accelerator: neuron\nmodel:\n  mcore_gpt: True\n  transformer_engine: True\n"
    text += "  sharp: True\n  hysteresis: 2\n"
    found = migrate(text)
    assert values(found.text)["model"] == {"mcore_gpt": True, "transformer_engine": True}
    said = entry(found.report, "model.transformer_engine")
    assert (said.action, said.level) == ("kept", "")
    assert "this backend's layers stand in" in said.why
    assert entry(found.report, "model.sharp").action == "dropped"


def test_fp8_is_an_error():
    found = migrate("trainer:\n  devices: 1\nmodel:\n  mcore_gpt: True\n  fp8: True\n")
    assert any(line.startswith("model.fp8=True: there is no fp8 training here") for line in found.report.errors)
