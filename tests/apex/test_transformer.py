"""apex.transformer: what is small is here, what has state is megatron-core's."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from nxdt_nemo.apex.transformer import enums, log_util, parallel_state, utils
from nxdt_nemo.apex.transformer.pipeline_parallel import utils as pipeline_utils
from nxdt_nemo.apex.transformer.pipeline_parallel.schedules.common import listify_model


def test_enums_are_apex_values() -> None:
    found = {
        cls.__name__: {m.name: m.value for m in cls}
        for cls in (enums.AttnMaskType, enums.AttnType, enums.LayerType, enums.ModelType)
    }
    assert found == {
        "AttnMaskType": {"padding": 1, "causal": 2},
        "AttnType": {"self_attn": 1, "cross_attn": 2},
        "LayerType": {"encoder": 1, "decoder": 2},
        "ModelType": {"encoder_or_decoder": 1, "encoder_and_decoder": 2},
    }


def test_divide() -> None:
    assert utils.divide(12, 4) == 3
    with pytest.raises(ValueError, match="13 is not divisible by 4"):
        utils.divide(13, 4)


def test_listify_model() -> None:
    model, chunks = "model", ["first", "last"]
    assert listify_model(model) == [model]
    assert listify_model(chunks) is chunks


def test_set_logging_level() -> None:
    logger = log_util.get_transformer_logger("apex.transformer.somewhere")
    root = logging.getLogger("nxdt_nemo.apex")
    before = root.level
    try:
        log_util.set_logging_level(logging.ERROR)
        assert not logger.isEnabledFor(logging.WARNING)
        log_util.set_logging_level("INFO")
        assert logger.isEnabledFor(logging.INFO)
    finally:
        root.setLevel(before)


def test_unknown_and_dunder_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="get_world_weather"):
        pipeline_utils.get_world_weather  # noqa: B018
    assert not hasattr(parallel_state, "__wrapped__")


# Apart: it imports megatron.core, which no test of this process must find imported before activation.
SAME_STATE = """
import megatron.core.num_microbatches_calculator as theirs
import megatron.core.parallel_state, megatron.core.tensor_parallel.layers as their_layers
import torch
from nxdt_nemo.apex.transformer import parallel_state, tensor_parallel
from nxdt_nemo.apex.transformer.microbatches import ConstantNumMicroBatches
from nxdt_nemo.apex.transformer.pipeline_parallel import utils
from nxdt_nemo.apex.transformer.tensor_parallel.layers import set_tensor_model_parallel_attributes

assert utils._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None
utils.setup_microbatch_calculator(
    rank=0, rampup_batch_size=None, global_batch_size=8, micro_batch_size=2, data_parallel_size=2
)
assert theirs.get_num_microbatches() == utils.get_num_microbatches() == 2
assert isinstance(utils._GLOBAL_NUM_MICROBATCHES_CALCULATOR, ConstantNumMicroBatches)
assert utils._GLOBAL_NUM_MICROBATCHES_CALCULATOR is theirs._GLOBAL_NUM_MICROBATCHES_CALCULATOR
utils._reconfigure_microbatch_calculator(
    rank=0, rampup_batch_size=None, global_batch_size=4, micro_batch_size=1, data_parallel_size=1
)
assert (theirs.get_num_microbatches(), utils.get_micro_batch_size(), utils.get_current_global_batch_size()) == (4, 1, 4)
utils.update_num_microbatches(100)
parallel_state.set_tensor_model_parallel_world_size(4)
assert megatron.core.parallel_state.get_tensor_model_parallel_world_size() == 4
assert tensor_parallel.ColumnParallelLinear is their_layers.ColumnParallelLinear
weight = torch.zeros(2)
set_tensor_model_parallel_attributes(weight, True, 0, 1)
assert (weight.tensor_model_parallel, weight.partition_dim) == (True, 0)
print("same state")
"""


def test_what_has_state_is_megatron_cores() -> None:
    pytest.importorskip("megatron.core.package_info")
    run = subprocess.run([sys.executable, "-c", SAME_STATE], capture_output=True, text=True, check=False)
    assert run.stdout.split("\n")[-2:] == ["same state", ""], run.stderr[-2000:]
