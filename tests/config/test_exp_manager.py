"""Each rule of `exp_manager:`: the line that it prints, and that what works passes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nxdt_nemo.config import exp_manager

Errors = Callable[..., list[str]]
EXP = "exp_manager"
SAVES = "exp_manager.checkpoint_callback_params"
ON_FILES = "NeMo 2.4 writes distributed checkpoints to file systems only"
MOUNT = "use a folder that all ranks share (FSx, EFS, a mounted bucket)"

WRONG = [  # overrides, the line
    ([f"+{SAVES}.dirpath=s3://bucket/run"], f"{SAVES}.dirpath=s3://bucket/run: {ON_FILES}; {MOUNT}"),
    ([f"{EXP}.exp_dir=msc://profile/run"], f"{EXP}.exp_dir=msc://profile/run: {ON_FILES}; {MOUNT}"),
    (
        [f"+{EXP}.create_dllogger_logger=True"],
        f"{EXP}.create_dllogger_logger=True needs the package dllogger, which is not installed; "
        "pip install git+https://github.com/NVIDIA/dllogger",
    ),
    (
        [f"+{EXP}.create_mlflow_logger=True"],
        f"{EXP}.create_mlflow_logger=True: NeMo 2.4.1 passes run_name to it twice, which Python refuses; "
        "use create_wandb_logger or create_tensorboard_logger",
    ),
    (
        [f"+{EXP}.create_wandb_logger=True", f"~{EXP}.wandb_logger_kwargs"],
        f"{EXP}.create_wandb_logger=True needs {EXP}.wandb_logger_kwargs.project; set it",
    ),
    (
        [f"+{EXP}.create_tensorboard_logger=True", "+trainer.logger=True"],
        f"trainer.logger=True beside {EXP}.create_tensorboard_logger=True: there can be one only; "
        "use trainer.logger=False",
    ),
    (
        ["+trainer.enable_checkpointing=True"],
        f"trainer.enable_checkpointing=True beside {EXP}'s checkpoint callback: there can be one only; "
        "use trainer.enable_checkpointing=False",
    ),
    (
        [f"+{EXP}.ema={{enable: True}}"],
        f"{EXP}.ema.enable=True: NeMo 2.4 keeps averaged weights in checkpoint files, not in distributed ones; "
        "use False",
    ),
    (
        [f"+{EXP}.create_straggler_detection_callback=True"],
        f"{EXP}.create_straggler_detection_callback=True needs nvidia-resiliency-ext, which is for CUDA; use False",
    ),
    (
        [f"+{EXP}.create_fault_tolerance_callback=True"],
        f"{EXP}.create_fault_tolerance_callback=True needs nvidia-resiliency-ext, which is for CUDA; use False",
    ),
    (
        [f"+{SAVES}.every_n_train_steps=10"],
        f"{SAVES}.every_n_train_steps=10 excludes {SAVES}.every_n_epochs=1, NeMo's default; "
        f"set {SAVES}.every_n_epochs=null",
    ),
    (
        [f"+{SAVES}.every_n_train_steps=10", f"+{SAVES}.every_n_epochs=2"],
        f"{SAVES}.every_n_train_steps=10 excludes {SAVES}.every_n_epochs=2; set {SAVES}.every_n_epochs=null",
    ),
    (
        [f"+{SAVES}.train_time_interval=600"],
        f"{SAVES}.train_time_interval=600: NeMo wants a timedelta, which YAML cannot write; "
        f"use {SAVES}.every_n_train_steps, and {EXP}.max_time_per_run for a time limit",
    ),
    (
        [f"+{EXP}.max_time_per_run='3:45:00'"],
        f"{EXP}.max_time_per_run=3:45:00 is not DD:HH:MM:SS; write 00:03:45:00 in quotes",
    ),
    (
        [f"+{SAVES}.monitor=null"],
        f"{SAVES}.monitor=null: NeMo needs a metric there, whatever save_top_k is; use val_loss",
    ),
    ([f"+{SAVES}.monitor=val_los"], f"{SAVES}.monitor=val_los is no metric that NeMo logs; did you mean val_loss?"),
    (
        [f"+{EXP}.create_early_stopping_callback=True", f"+{EXP}.early_stopping_callback_params.monitor=valloss"],
        f"{EXP}.early_stopping_callback_params.monitor=valloss is no metric that NeMo logs; did you mean val_loss?",
    ),
    (
        [f"+{SAVES}.save_top_k=-2"],
        f"{SAVES}.save_top_k=-2; use -1 for all, 0 for none, or a number of checkpoints",
    ),
    (
        [f"+{SAVES}.always_save_nemo=True", "model.tensor_model_parallel_size=2"],
        f"{SAVES}.always_save_nemo=True: NeMo does not do it with model.tensor_model_parallel_size=2; "
        f"use {SAVES}.save_nemo_on_train_end",
    ),
    (
        [f"+{SAVES}.always_save_nemo=True", f"+{SAVES}.save_best_model=True"],
        f"{SAVES}.always_save_nemo=True with save_best_model=True: NeMo would read the best checkpoint as a file; "
        f"use {SAVES}.save_nemo_on_train_end",
    ),
    (
        [f"+{SAVES}.async_save=True", f"+{SAVES}.save_last_n_optim_states=0", f"+{SAVES}.filename='x-{{step}}'"],
        f"{SAVES}.async_save=True with save_last_n_optim_states: NeMo would move a checkpoint not yet written; "
        "use one of them",
    ),
    (
        [f"+{SAVES}.async_save=True", "+model.dist_ckpt_format=zarr"],
        f"{SAVES}.async_save=True with model.dist_ckpt_format=zarr; use torch_dist",
    ),
    (
        [f"+{SAVES}.save_last_n_optim_states=1", f"+{SAVES}.filename='x-{{val_loss:.2f}}'"],
        f"{SAVES}.save_last_n_optim_states=1 needs -{{step}} in {SAVES}.filename; add it",
    ),
    (
        [
            f"+{SAVES}.save_last_n_optim_states=1",
            f"+{SAVES}.filename='x-{{step}}'",
            f"+{SAVES}.auto_insert_metric_name=False",
        ],
        f"{SAVES}.save_last_n_optim_states=1 needs {SAVES}.auto_insert_metric_name=True; leave it out",
    ),
    (
        [f"+{SAVES}.save_weights_only=True"],
        f"{SAVES}.save_weights_only=True: NeMo 2.4 looks for the optimizer's state in a distributed checkpoint; "
        f"use {SAVES}.save_last_n_optim_states=0",
    ),
    (
        [f"+{EXP}.files_to_copy=[/no/such/file]"],
        f"{EXP}.files_to_copy: there is no file /no/such/file",
    ),
    (
        [f"+{EXP}.log_local_rank_0_only=True", f"+{EXP}.log_global_rank_0_only=True"],
        f"{EXP}.log_local_rank_0_only=True with {EXP}.log_global_rank_0_only=True; use one of them",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_what_would_fail_later_is_one_line(errors: Errors, overrides: list[str], line: str) -> None:
    assert errors(*overrides) == [f"tiny_gpt.yaml: {line}"]


@pytest.mark.parametrize(
    "overrides",
    [
        [f"+{SAVES}.every_n_train_steps=10", f"+{SAVES}.every_n_epochs=null"],
        [f"+{SAVES}.every_n_train_steps=10", f"+{SAVES}.every_n_epochs=0"],
        [f"+{EXP}.max_time_per_run='00:03:45:00'"],
        [f"+{SAVES}.monitor=bleu_of_my_own"],
        [f"+{SAVES}.monitor=reduced_train_loss", f"+{SAVES}.save_top_k=-1"],
        [f"+{SAVES}.async_save=True"],
        [f"+{SAVES}.always_save_nemo=True"],
        [  # NeMo's megatron_gpt_generate_config.yaml says so, and trains nothing
            *(f"+{SAVES}.always_save_nemo=True", "model.tensor_model_parallel_size=2"),
            *("+model.data.test_ds={file_names: [a.jsonl]}",),
        ],
        [f"+{EXP}.create_wandb_logger=True", f"+{EXP}.wandb_logger_kwargs.offline=True"],
        [f"+{EXP}.create_checkpoint_callback=False", f"+{SAVES}.monitor=null", "+trainer.enable_checkpointing=True"],
        [f"+{EXP}.resume_if_exists=True"],
        ["exp_manager=null"],
    ],
    ids=" ".join,
)
def test_what_works_passes(errors: Errors, overrides: list[str]) -> None:
    assert errors(*overrides) == []


def test_a_logger_whose_package_is_missing(errors: Errors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exp_manager, "find_spec", lambda name: None)
    for name, (module, install) in exp_manager.LOGGERS.items():
        line = f"{EXP}.{name}=True needs the package {module}, which is not installed; {install}"
        assert errors(f"+{EXP}.{name}=True") == [f"tiny_gpt.yaml: {line}"]


def test_wandb_without_a_key(errors: Errors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.chdir(tmp_path)
    asked = f"+{EXP}.create_wandb_logger=True"
    line = f"{EXP}.create_wandb_logger=True: no API key for wandb; run `wandb login` or set WANDB_MODE=offline"
    assert errors(asked) == [f"tiny_gpt.yaml: {line}"]
    for name, value in {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}.items():
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert errors(asked) == []
    (tmp_path / ".netrc").touch()
    assert errors(asked) == []


def test_a_checkpoint_to_resume_is_there(errors: Errors, tmp_path: Path) -> None:
    resume = [f"+{EXP}.explicit_log_dir={tmp_path}", f"+{EXP}.resume_if_exists=True"]
    missing = f"tiny_gpt.yaml: {EXP}.resume_if_exists=True and no checkpoint in {tmp_path / 'checkpoints'}"
    assert errors(*resume) == [f"{missing}; set {EXP}.resume_ignore_no_checkpoint=True to start anew"]
    assert errors(*resume, f"+{EXP}.resume_ignore_no_checkpoint=True") == []
    (tmp_path / "checkpoints" / "gpt--step=4").mkdir(parents=True)
    assert len(errors(*resume)) == 1
    (tmp_path / "checkpoints" / "gpt--step=4-last").mkdir()
    assert errors(*resume) == []
    assert errors(*resume, f"+{EXP}.resume_from_checkpoint=/gone") == []  # the newer one of this run is taken


def test_resume_from_checkpoint_is_a_folder(errors: Errors, tmp_path: Path) -> None:
    where = [f"+{EXP}.explicit_log_dir={tmp_path}", f"+{EXP}.resume_from_checkpoint={tmp_path / 'other'}"]
    line = f"tiny_gpt.yaml: {EXP}.resume_from_checkpoint={tmp_path / 'other'} is no distributed checkpoint"
    assert errors(*where) == [f"{line}; name its folder, without .ckpt"]
    (tmp_path / "other").mkdir()
    assert errors(*where) == []


def test_nothing_is_kept_and_something_was(errors: Errors, tmp_path: Path) -> None:
    where = [f"+{SAVES}.dirpath={tmp_path}", f"+{EXP}.resume_if_exists=True", f"+{SAVES}.save_top_k=0"]
    (tmp_path / "gpt--val_loss=6.93-step=6-last").mkdir()
    assert errors(*where) == []
    (tmp_path / "gpt--val_loss=6.94-step=4").mkdir()
    reason = f"{SAVES}.save_top_k=0, and {tmp_path} holds gpt--val_loss=6.94-step=4, which NeMo would delete"
    fix = f"use {SAVES}.save_top_k=1, or move the checkpoints of the run before"
    assert errors(*where) == [f"tiny_gpt.yaml: {reason} and then stop; {fix}"]
