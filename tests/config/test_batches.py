"""How a run comes to its batches: each line, and silence for what trains."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config import check
from nxdt_nemo.config.validate import validate_config

STEPS = "trainer.max_steps=-1: NeMo builds as many samples as the steps need; set the number of steps"
INTERVAL = "is no interval; use 1 or more; trainer.limit_val_batches=0 for none"
RAMP = "model.rampup_batch_size"

WRONG = [  # overrides, the line
    (["trainer.max_steps=-1"], STEPS),
    (["~trainer.max_steps"], STEPS),
    (
        ["+trainer.limit_train_batches=0.5"],
        "trainer.limit_train_batches=0.5: NeMo 2.4 makes no batch of a fraction; use a number of steps, or 1.0",
    ),
    (["+trainer.val_check_interval=0"], f"trainer.val_check_interval=0 {INTERVAL}"),
    (["+trainer.val_check_interval=0.0", "trainer.limit_val_batches=0"], f"trainer.val_check_interval=0.0 {INTERVAL}"),
    (
        ["model.data.dataloader_type=batch"],
        "model.data.dataloader_type=batch is no sampler of this model; use single or cyclic",
    ),
    (
        ["model.data.dataloader_type=LDDL"],
        "model.data.dataloader_type=LDDL is no sampler of this model; use single or cyclic",
    ),
    *(
        (
            [f"+{RAMP}={value}"],
            f"{RAMP}={value} is not a first size, an increment and a number of samples; write [32,32,10000]",
        )
        for value in ("[1,2]", "[2,2,x]", "[2,0,100]")
    ),
    *(
        (
            [f"+{RAMP}=[{first},4,100]"],
            f"{RAMP}=[{first},4,100] does not come to model.global_batch_size=8; begin whole increments of 4 below it",
        )
        for first in (2, 8)
    ),
]
RIGHT = [
    [f"+{RAMP}=[4,2,100]"],
    [f"+{RAMP}=null"],
    ["+trainer.val_check_interval=0.25"],
    ["model.data.dataloader_type=cyclic"],
    ["+trainer.limit_train_batches=3"],
]


@pytest.mark.parametrize(("overrides", "line"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_a_wrong_one_is_one_line(errors, overrides, line):
    assert errors(*overrides) == [f"tiny_gpt.yaml: {line}"]


@pytest.mark.parametrize("overrides", RIGHT, ids=" ".join)
def test_what_trains_is_not_refused(errors, overrides):
    assert errors(*overrides) == []


@pytest.mark.parametrize("said", [{}, {"max_steps": -1}])
@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_pairs_of_answers_need_a_number_of_steps(said, method):
    """Their configurations have no splits_string."""
    model = {"optim": {"name": "fused_adam"}, "data": {"train_ds": {"file_names": ["a"]}}}
    of = {"trainer": {"devices": 1} | said, "model": model, "neuron": {"alignment": {method: {}}}}
    (error,) = validate_config(OmegaConf.create(of)).errors
    assert str(error) == STEPS
    of["trainer"]["max_steps"] = 5
    assert validate_config(OmegaConf.create(of)).good


def test_rows_of_token_ids_need_a_number_of_steps(tmp_path):
    data = {"data_impl": "arrow", "data_prefix": {"train": [str(tmp_path)], "validation": [str(tmp_path)]}}
    of = OmegaConf.create({"trainer": {"devices": 1}, "model": {"optim": {"name": "fused_adam"}, "data": data}})
    assert STEPS in [str(error) for error in check(of).errors]
