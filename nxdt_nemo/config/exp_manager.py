"""The rules of `exp_manager:`, so that no key of it fails at the first save.

Room config/ (leaf). Stands in for what nemo.utils.exp_manager, its callbacks and Lightning's ModelCheckpoint raise,
mostly on one rank, some of it hours later. What works is left alone; docs/exp_manager.md lists all keys.
May import the standard library and our config/ and errors. Proof: tests/config/test_exp_manager.py.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nxdt_nemo.config.values import kind_of_model
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["ERRORS", "consumed_samples"]

Errors = Iterator[ConfigError]

EXP = "exp_manager"
SAVES = f"{EXP}.checkpoint_callback_params"
# key of a logger: (module, what to install)
LOGGERS = {
    "create_wandb_logger": ("wandb", "pip install wandb"),
    "create_dllogger_logger": ("dllogger", "pip install git+https://github.com/NVIDIA/dllogger"),
    "create_clearml_logger": ("clearml", "pip install clearml"),
    "create_neptune_logger": ("neptune", "pip install neptune"),
}
NAMED = ("wandb", "neptune")  # loggers that NeMo wants a name or a project for
RESILIENCY = ("create_straggler_detection_callback", "create_fault_tolerance_callback")
# Metrics of NeMo's language models that a misspelling may have meant; scripts log others too.
METRICS = ("val_loss", "validation_loss", "reduced_train_loss", "grad_norm", "global_step", "consumed_samples")
DURATION = re.compile(r"\d+:\d\d:\d\d:\d\d")


def _saves(view: View) -> bool:
    """True if NeMo's checkpoint callback is made, and there is a training for it to save."""
    data = view.raw("model.data")
    generates = isinstance(data, dict) and "test_ds" in data and "train_ds" not in data
    return view.get(EXP) is not None and bool(view.get(f"{EXP}.create_checkpoint_callback", True)) and not generates


def remote_folders(view: View) -> Errors:
    """Distributed checkpoints, and the rename that completes them, need a file system."""
    for key in (f"{SAVES}.dirpath", f"{EXP}.explicit_log_dir", f"{EXP}.exp_dir"):
        value = view.get(key)
        if isinstance(value, str) and "://" in value:
            reason = f"{key}={value}: NeMo 2.4 writes distributed checkpoints to file systems only"
            yield view.error(reason, "use a folder that all ranks share (FSx, EFS, a mounted bucket)")


def loggers(view: View) -> Errors:
    """A logger's package is installed, and it has the names that NeMo asks for."""
    for name, (module, install) in LOGGERS.items():
        key = f"{EXP}.{name}"
        if not view.get(key, False):
            continue
        if find_spec(module) is None:
            yield view.here(f"{key}=True needs the package {module}, which is not installed", install)
        elif module in NAMED:
            kwargs = view.get(f"{EXP}.{module}_logger_kwargs", {})
            if "name" not in kwargs and "project" not in kwargs:
                yield view.error(f"{key}=True needs {EXP}.{module}_logger_kwargs.project", "set it")
            elif module == "wandb" and not _wandb_can_start(kwargs):
                yield view.here(f"{key}=True: no API key for wandb", "run `wandb login` or set WANDB_MODE=offline")
    if view.get(f"{EXP}.create_mlflow_logger", False):
        reason = f"{EXP}.create_mlflow_logger=True: NeMo 2.4.1 passes run_name to it twice, which Python refuses"
        yield view.error(reason, "use create_wandb_logger or create_tensorboard_logger")


def _wandb_can_start(kwargs: dict[str, Any]) -> bool:
    """False only where nothing that wandb takes a key or a mode from is there, and nobody can be asked."""
    home = Path.home()
    named = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DISABLED")
    files = [
        Path(os.environ.get("NETRC") or home / ".netrc"),
        home / "_netrc",
        Path(os.environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb", "settings"),
        Path("wandb", "settings"),
    ]
    return (
        any(os.environ.get(name) for name in named)
        or any(kwargs.get(name) for name in ("offline", "mode", "settings"))
        or any(file.is_file() for file in files)
        or (sys.stdin is not None and sys.stdin.isatty())
    )


def beside_the_trainer(view: View) -> Errors:
    """exp_manager brings its own logger and checkpoint callback; NeMo refuses a second one."""
    made = [f"{EXP}.{key}" for key in ("create_tensorboard_logger", *LOGGERS) if view.get(f"{EXP}.{key}", False)]
    if made and view.get("trainer.logger") is True:
        reason = f"trainer.logger=True beside {made[0]}=True: there can be one only"
        yield view.error(reason, "use trainer.logger=False")
    if _saves(view) and view.get("trainer.enable_checkpointing") is True:
        reason = f"trainer.enable_checkpointing=True beside {EXP}'s checkpoint callback: there can be one only"
        yield view.error(reason, "use trainer.enable_checkpointing=False")


def absent_parts(view: View) -> Errors:
    """What NeMo 2.4 cannot do with distributed checkpoints, or only with a package for CUDA."""
    if view.get(f"{EXP}.ema.enable", False):
        reason = f"{EXP}.ema.enable=True: NeMo 2.4 keeps averaged weights in checkpoint files, not in distributed ones"
        yield view.error(reason, "use False")
    for name in RESILIENCY:
        if view.get(f"{EXP}.{name}", False):
            yield view.error(f"{EXP}.{name}=True needs nvidia-resiliency-ext, which is for CUDA", "use False")


def consumed_samples(view: View) -> Errors:
    """NeMo reads from a checkpoint's name how far its data went, and begins anew when that is not there."""
    anew = "NeMo reads there how far the data went, and would begin anew"
    key, inserts = f"{SAVES}.filename", view.get(f"{SAVES}.auto_insert_metric_name", True)
    name, wanted = view.get(key), "consumed_samples" if inserts else "consumed_samples="
    if _saves(view) and kind_of_model(view) and isinstance(name, str) and wanted not in name:
        fix = "end it with -{consumed_samples}" if inserts else "end it with -consumed_samples={consumed_samples}"
        yield view.error(f"{key}={name} has no consumed_samples=: {anew}", fix)
    key = f"{EXP}.resume_from_checkpoint"
    path = view.get(key)
    if kind_of_model(view) and isinstance(path, str) and "consumed_samples=" not in path:
        yield view.error(f"{key}={path} has no consumed_samples=: {anew}", "name a checkpoint as NeMo names it")


def times_of_saving(view: View) -> Errors:
    """NeMo sets every_n_epochs=1 by itself, and Lightning allows one way to say when to save."""
    if not _saves(view):
        return
    steps, epochs = f"{SAVES}.every_n_train_steps", f"{SAVES}.every_n_epochs"
    by_epoch = 1 if not view.has(epochs) else view.number(epochs) or 0
    if (view.number(steps) or 0) > 0 and by_epoch > 0:
        default = "" if view.has(epochs) else ", NeMo's default"
        yield view.error(f"{steps}={view.get(steps)} excludes {epochs}={by_epoch}{default}", f"set {epochs}=null")
    interval = f"{SAVES}.train_time_interval"
    if view.get(interval) is not None:
        reason = f"{interval}={view.get(interval)}: NeMo wants a timedelta, which YAML cannot write"
        yield view.error(reason, f"use {steps}, and {EXP}.max_time_per_run for a time limit")
    limit = view.get(f"{EXP}.max_time_per_run")
    if limit is not None and not DURATION.fullmatch(str(limit)):
        yield view.error(f"{EXP}.max_time_per_run={limit} is not DD:HH:MM:SS", "write 00:03:45:00 in quotes")


def best_ones(view: View) -> Errors:
    """What the best checkpoints are chosen by, and how many of them."""
    if not _saves(view):
        return
    key, keep = f"{SAVES}.monitor", view.number(f"{SAVES}.save_top_k")
    if view.has(key) and view.raw(key) is None:
        yield view.error(f"{key}=null: NeMo needs a metric there, whatever save_top_k is", "use val_loss")
    if keep is not None and keep < -1:
        yield view.error(f"{SAVES}.save_top_k={keep}", "use -1 for all, 0 for none, or a number of checkpoints")
    if view.get(f"{SAVES}.save_weights_only", False):
        reason = f"{SAVES}.save_weights_only=True: NeMo 2.4 looks for the optimizer's state in a distributed checkpoint"
        yield view.error(reason, f"use {SAVES}.save_last_n_optim_states=0")
    stops = f"{EXP}.early_stopping_callback_params.monitor"
    keys = [key, stops] if view.get(f"{EXP}.create_early_stopping_callback", False) else [key]
    for monitor in keys:
        value = view.get(monitor)
        near = difflib.get_close_matches(str(value), METRICS, n=1, cutoff=0.8)
        if near and value not in METRICS:
            yield view.error(f"{monitor}={value} is no metric that NeMo logs", f"did you mean {near[0]}?")


def nemo_files(view: View) -> Errors:
    """A .nemo file at every save: one rank only, and never of the best checkpoint, which is a folder here."""
    key = f"{SAVES}.always_save_nemo"
    if not _saves(view) or not view.get(key, False):
        return
    degrees = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    split = [f"model.{name}={view.size(f'model.{name}')}" for name in degrees if view.size(f"model.{name}") > 1]
    if split:
        yield view.error(f"{key}=True: NeMo does not do it with {split[0]}", f"use {SAVES}.save_nemo_on_train_end")
    elif view.get(f"{SAVES}.save_best_model", False):
        reason = f"{key}=True with save_best_model=True: NeMo would read the best checkpoint as a file"
        yield view.error(reason, f"use {SAVES}.save_nemo_on_train_end")


def asynchronous(view: View) -> Errors:
    """What NeMo does not wait for when checkpoints are written beside the training."""
    if not _saves(view) or not view.get(f"{SAVES}.async_save", False):
        return
    if (view.number(f"{SAVES}.save_last_n_optim_states", -1) or 0) >= 0:
        reason = f"{SAVES}.async_save=True with save_last_n_optim_states: NeMo would move a checkpoint not yet written"
        yield view.error(reason, "use one of them")
    form = view.get("model.dist_ckpt_format", "torch_dist")
    if form != "torch_dist":
        yield view.error(f"{SAVES}.async_save=True with model.dist_ckpt_format={form}", "use torch_dist")


def dropped_optimizer_states(view: View) -> Errors:
    """NeMo finds the step of a checkpoint in its name."""
    key, name = f"{SAVES}.save_last_n_optim_states", str(view.get(f"{SAVES}.filename", ""))
    if not _saves(view) or (view.number(key, -1) or 0) < 0:
        return
    if "-{step" not in name:
        yield view.error(f"{key}={view.get(key)} needs -{{step}} in {SAVES}.filename", "add it")
    if not view.get(f"{SAVES}.auto_insert_metric_name", True):
        yield view.error(f"{key}={view.get(key)} needs {SAVES}.auto_insert_metric_name=True", "leave it out")


def checkpoint_to_resume(view: View) -> Errors:
    """The checkpoint that the run asks for is there."""
    folder = _folder(view)
    if folder is None:
        return
    resumes = view.get(f"{EXP}.resume_if_exists", False)
    if resumes and any(path.is_dir() for ending in ("last", "end") for path in folder.glob(f"*{ending}")):
        return
    named = view.get(f"{EXP}.resume_from_checkpoint")
    if named is not None and not Path(str(named)).is_dir():
        reason = f"{EXP}.resume_from_checkpoint={named} is no distributed checkpoint"
        yield view.here(reason, "name its folder, without .ckpt")
    if resumes and not view.get(f"{EXP}.resume_ignore_no_checkpoint", False):
        reason = f"{EXP}.resume_if_exists=True and no checkpoint in {folder}"
        yield view.here(reason, f"set {EXP}.resume_ignore_no_checkpoint=True to start anew")


def best_ones_of_before(view: View) -> Errors:
    """NeMo deletes what an earlier run kept beyond save_top_k, and stops in an IndexError when none is left."""
    folder, key = _folder(view), f"{SAVES}.save_top_k"
    if folder is None or view.number(key) != 0 or not view.get(f"{EXP}.resume_if_exists", False):
        return
    ranked = f"{view.get(f'{SAVES}.monitor', 'val_loss')}="
    kept = [path for path in folder.glob(f"*{ranked}*") if path.is_dir() and not path.name.endswith("-last")]
    if kept and _saves(view):
        reason = f"{key}=0, and {folder} holds {kept[0].name}, which NeMo would delete and then stop"
        yield view.here(reason, f"use {key}=1, or move the checkpoints of the run before")


def _folder(view: View) -> Path | None:
    """Where the run's checkpoints are, if the config says it as it stands."""
    for key, below in ((f"{SAVES}.dirpath", "."), (f"{EXP}.explicit_log_dir", "checkpoints")):
        value = view.get(key)
        if isinstance(value, str):
            return None if "://" in value else Path(value, below)
    return None


def other_keys(view: View) -> Errors:
    """Files to copy are there; a log is on one rank of a host or of all."""
    for file in view.get(f"{EXP}.files_to_copy", []):
        if not os.path.isfile(str(file)):
            yield view.here(f"{EXP}.files_to_copy: there is no file {file}")
    both = [f"{EXP}.{name}" for name in ("log_local_rank_0_only", "log_global_rank_0_only")]
    if all(view.get(key, False) for key in both):
        yield view.error(f"{both[0]}=True with {both[1]}=True", "use one of them")


ERRORS: tuple[Callable[[View], Errors], ...] = (
    remote_folders,
    loggers,
    beside_the_trainer,
    absent_parts,
    times_of_saving,
    best_ones,
    nemo_files,
    asynchronous,
    dropped_optimizer_states,
    checkpoint_to_resume,
    best_ones_of_before,
    other_keys,
)
