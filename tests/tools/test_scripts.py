"""The table of tools/scripts.py has a row for each of NeMo's scripts, and refuses those that the backend refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nxdt_nemo.cli.unsupported import refused

CHECKOUT = os.environ.get("NXDT_NEMO_CHECKOUT", "")
NAMES = """
bert_pretraining convert_weights_to_nemo1.0 mamba_change_num_partition megatron_bart_pretraining
megatron_bert_pretraining megatron_change_num_partitions megatron_ckpt_to_nemo megatron_export
megatron_gpt_distillation megatron_gpt_drop_layers megatron_gpt_eval megatron_gpt_mcore_batch_eval
megatron_gpt_pretraining megatron_gpt_prune megatron_gpt_ptq megatron_gpt_test megatron_gpt_validate
megatron_griffin_finetuning megatron_griffin_generate megatron_lm_ckpt_to_nemo megatron_mamba_eval
megatron_retro_cal_shape megatron_retro_eval megatron_retro_eval_legacy megatron_retro_fine_tune
megatron_retro_mutransfer_pretrain megatron_retro_pretraining megatron_retro_pretraining_legacy
megatron_retro_qatask_eval megatron_t5_eval megatron_t5_lm_adaptation_finetune megatron_t5_pretraining
megatron_t5_seq2seq_eval megatron_t5_seq2seq_finetune transformer_lm tuning/megatron_gpt_finetuning
tuning/megatron_gpt_generate tuning/megatron_gpt_qat tuning/megatron_mamba_finetuning tuning/megatron_mamba_generate
tuning/megatron_t5_finetuning tuning/megatron_t5_generate upcycle_dense_to_moe
""".split()


@pytest.fixture(scope="module")
def table(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("scripts")


def own(table: Any) -> set[str]:
    return {row.script for row in table.ROWS if not row.script.startswith("scripts/")}


def test_every_script_has_a_row_and_every_row_its_name(table: Any) -> None:
    assert own(table) == set(NAMES)
    names = [row.name for row in table.ROWS]
    assert len(set(names)) == len(names)
    assert all(set(row.needs) <= set(names) for row in table.ROWS)


@pytest.mark.upstream
@pytest.mark.skipif(not CHECKOUT, reason="NXDT_NEMO_CHECKOUT names no checkout of NeMo v2.4.0")
def test_they_are_those_of_the_checkout(table: Any) -> None:
    """And a row without arguments is of a script that is refused by what stands in it, no other."""
    folder = Path(CHECKOUT) / table.FOLDER
    assert own(table) == {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.py")}
    for row in table.ROWS:
        assert (refused(row.path(Path(CHECKOUT)).read_bytes()) is not None) == (not row.words), row.script
