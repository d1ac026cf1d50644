"""Reading and judging a file without a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from nxdt_nemo.config.validate import read, validate
from nxdt_nemo.errors import UserError

CONF = Path(__file__).parent / "data" / "conf"
TINY = CONF / "tiny_gpt.yaml"


def test_a_file_with_defaults_is_composed():
    found = validate(TINY)
    assert found.good
    assert found.ranks == 1
    assert "model.data.data_prefix" in found.to_be_set


def test_what_is_still_to_be_given_is_no_error_and_a_wrong_one_is():
    assert validate(TINY, ["model.data.data_prefix=7"]).good is False


def test_files_that_are_not_here_are_warnings():
    found = validate(TINY, ["model.data.data_prefix=[/nowhere/text]"])
    assert found.good
    assert any(
        line.startswith("on this machine:") and "/nowhere/text.bin does not exist" in line for line in found.warnings
    )


def test_a_plain_file_needs_no_hydra(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("trainer: {devices: 4, num_nodes: 2}\nmodel: {x: '${multiply:2,3}'}\n")
    cfg = read(file)
    assert cfg.model.x == 6
    assert validate(file).ranks == 8


@pytest.mark.parametrize(
    "text, line",
    [
        ("- 1\n", "a.yaml: is a list, not a configuration; begin with trainer: and model:"),
        ("a: [1\n", "a.yaml: not readable as YAML"),
        ("a: 1\n", "a.yaml: trainer is not a section; write trainer: and its keys below it"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, line):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    try:
        lines = [str(error) for error in validate(file).errors]
    except UserError as error:
        lines = [str(error)]
    assert lines[0].startswith(line)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        validate(tmp_path / "no.yaml")


def test_a_broken_section_of_ours_hides_nothing_else():
    found = validate(TINY, ["+neuron.runtme=cpu", "model.tensor_model_parallel_size=3"])
    assert found.errors[0].reason.startswith("unknown key neuron.runtme")
    assert len(found.errors) > 1


def test_strict(tmp_path):
    override = ["+model.num_layer=4"]
    assert validate(TINY, override).good
    (error,) = validate(TINY, override, strict=True).errors
    assert str(error).startswith("tiny_gpt.yaml: unknown key model.num_layer;")
