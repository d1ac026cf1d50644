"""`nxdt-nemo audit` of what it does not lower: one line each, before anything is started."""

from __future__ import annotations

import pytest

from nxdt_nemo.cli.app import parsed
from nxdt_nemo.errors import ConfigError

LLAMA = ["model=llama3_8b", "target=trn2"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["workflow=lora", *LLAMA], "train: model.peft: an audit lowers the pretraining of a GPT only"),
        (["workflow=dpo", *LLAMA], "train: neuron.alignment: an audit lowers"),
        (["model=bert"], "train: model.mcore_bert: an audit lowers"),
        ([*LLAMA, "model.tensor_model_parallel_size=1"], "model.tensor_model_parallel_size above 1; use"),
        ([*LLAMA, "--world", "24"], "24 ranks are not divisible by model.tensor_model_parallel_size"),
        ([*LLAMA, "--except", "5:model.global_batch_size=7"], "model.global_batch_size=7 is not divisible by"),
    ],
)
def test_what_is_not_lowered_is_refused(arguments: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parsed(["audit", "train", *arguments])
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_a_deadlock_check_without_pairs_does_not_say_that_all_is_well() -> None:
    from nxdt_nemo.cli.audit import agreement

    assert "nothing compared" in agreement(0)
    assert agreement(1).startswith("the one pair") and agreement(3).startswith("3 pairs")
