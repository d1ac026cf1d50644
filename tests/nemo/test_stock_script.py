"""NVIDIA's own script and configurations of NeMo v2.4.0, byte for byte, with overrides only.

They are in the public repository and not in the wheel: name a checkout in NXDT_NEMO_CHECKOUT.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Run

CHECKOUT = os.environ.get("NXDT_NEMO_CHECKOUT", "")
FOLDER = Path(CHECKOUT) / "examples/nlp/language_modeling"
PUBLISHED = {
    "megatron_gpt_pretraining.py": "bcd236b96f352116ab58e5f02f87849ec93e047d4378e5ff34838bffd65ece38",
    "conf/megatron_gpt_config.yaml": "5e910e93c75e723f4a62b13c8b57a8237292235740cb8ceffaf23adf5515761a",
    "conf/megatron_llama_config.yaml": "9910153b45e35ff190bce4d288fe8627163152774c99c75720dc69b9bec5b093",
}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "nxdt_nemo", "run")
RUN = ("-m", "nxdt_nemo", "run")

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.slow,
    pytest.mark.ranks,
    pytest.mark.skipif(not CHECKOUT, reason="NXDT_NEMO_CHECKOUT names no checkout of NeMo v2.4.0"),
]


def test_files_are_as_published() -> None:
    found = {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in PUBLISHED}
    assert found == PUBLISHED


CASES = [  # configuration, launcher, overrides
    ("megatron_gpt_config", RUN, ["trainer.devices=1", "trainer.precision=32"]),
    ("megatron_gpt_config", RUN, ["trainer.devices=2", "trainer.precision=bf16"]),  # O2, DP=2
    (
        "megatron_gpt_config",
        TORCHRUN,
        ["trainer.devices=2", "trainer.precision=bf16", "model.tensor_model_parallel_size=2"],
    ),
    (
        "megatron_llama_config",
        RUN,
        [
            "trainer.devices=2",
            "trainer.precision=bf16",
            "model.tensor_model_parallel_size=2",
            "model.sequence_parallel=True",
            "model.num_query_groups=2",
            "model.optim.sched.constant_steps=0",
        ],
    ),
    (
        "megatron_llama_config",
        RUN,
        [
            "trainer.devices=2",
            "trainer.precision=32",
            "model.pipeline_model_parallel_size=2",
            "model.num_query_groups=4",
            "model.optim.sched.constant_steps=0",
            "model.optim.name=adamw",
        ],
    ),
]


@pytest.mark.parametrize("config, launcher, overrides", CASES)
def test_trains_saves_and_resumes(
    train: Callable[..., Run],
    corpus: Path,
    tmp_path: Path,
    config: str,
    launcher: tuple[str, ...],
    overrides: list[str],
) -> None:
    arguments = [
        "--config-path=conf",
        f"--config-name={config}",
        "trainer.accelerator=neuron",
        "trainer.log_every_n_steps=1",
        "trainer.val_check_interval=3",
        "trainer.limit_val_batches=1",
        "model.encoder_seq_length=32",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "model.num_attention_heads=4",
        "model.micro_batch_size=2",
        "model.global_batch_size=4",
        "model.tokenizer.library=sentencepiece",
        "model.tokenizer.type=null",
        f"model.tokenizer.model={corpus / 'tokenizer.model'}",
        f"++model.data.data_prefix=[1.0,{corpus / 'text_document'}]",
        f"model.data.index_mapping_dir={tmp_path / 'index'}",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        "model.optim.lr=2e-3",
        "model.optim.sched.warmup_steps=2",
        "model.optim.sched.min_lr=1e-4",
        *overrides,
    ]
    script = FOLDER / "megatron_gpt_pretraining.py"
    first = train("trainer.max_steps=6", script=script, command=launcher, arguments=arguments)
    assert first.code == 0, first.output[-3000:]
    losses = first.curve()
    assert len(losses) == 6
    assert losses[5] < losses[0]

    again = train("trainer.max_steps=9", script=script, command=launcher, arguments=arguments)
    assert again.code == 0, again.output[-3000:]
    assert "Restored all states from the checkpoint" in again.output
    assert sorted(again.curve()) == list(range(9))
