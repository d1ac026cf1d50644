"""NNM's train_setup.sh."""

from __future__ import annotations

import pytest

from nxdt_nemo.config.migrate.train_setup import training_precision
from nxdt_nemo.errors import UserError


@pytest.mark.parametrize(
    "text, said",
    [
        ('training_precision="bf16SR"\n', "bf16SR"),
        ('#training_precision="fp32"\n  export training_precision=megatron_amp_O2 # here\n', "megatron_amp_O2"),
        ("training_precision='fp32'\ntraining_precision='fp32_OptStates'\n", "fp32_OptStates"),
    ],
)
def test_the_last_value_counts(tmp_path, text, said):
    file = tmp_path / "train_setup.sh"
    file.write_text(text)
    assert training_precision(file) == said


@pytest.mark.parametrize(
    "text, reason",
    [("echo\n", "sets no training_precision"), ("training_precision=fp8\n", "training_precision=fp8 is not known")],
)
def test_mistakes_are_one_line(tmp_path, text, reason):
    file = tmp_path / "train_setup.sh"
    file.write_text(text)
    with pytest.raises(UserError, match=reason):
        training_precision(file)
    with pytest.raises(UserError, match="cannot be read"):
        training_precision(tmp_path / "none.sh")
