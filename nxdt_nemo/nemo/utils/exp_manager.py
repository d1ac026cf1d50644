"""Which checkpoint a run goes on from after a kill at any moment; and two of NxD Training's keys.

Room nemo/. Wraps nemo.utils.exp_manager.exp_manager, which refuses keys that it does not know, and check_resume, which
stops when a kill between two of its steps left two checkpoints that end with -last, and overlooks a newer one whose
-last was not begun. On disk it only gives a replaced checkpoint its name back: on a torchrun job each rank comes here
by itself. Proof: tests/nemo/test_resume.py, tools/resume.py, tests/nemo/test_exp_manager.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from omegaconf import OmegaConf

from nxdt_nemo import console, folders
from nxdt_nemo.nemo.utils.callbacks.norms import NormLogger

__all__ = ["check_resume", "exp_manager", "newest"]

NORMS = ("log_parameter_norm", "log_gradient_norm")
STEP = re.compile(r"step=(\d+)")


def exp_manager(original: Callable[..., Any], trainer: Any, cfg: Any = None) -> Any:
    """As upstream, which makes callbacks of its keys; and the one of NORMS."""
    if cfg is None or not any(key in cfg for key in NORMS):
        return original(trainer, cfg)
    # resolved, as upstream does next
    keys: Any = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else dict(cfg)
    wanted = [bool(keys.pop(key, False)) for key in NORMS]
    folder = original(trainer, OmegaConf.create(keys))
    if any(wanted):
        trainer.callbacks.append(NormLogger(*wanted))
    return folder


def check_resume(
    original: Callable[..., None],
    trainer: Any,
    log_dir: str,
    resume_if_exists: bool = False,
    resume_past_end: bool = False,
    resume_ignore_no_checkpoint: bool = False,
    dirpath: str | None = None,
    resume_from_checkpoint: str | None = None,
) -> None:
    """As upstream, which finds the checkpoint to resume, where newest() agrees with it; else that one."""
    folder = Path(dirpath) if dirpath else Path(log_dir, "checkpoints")
    if resume_if_exists:
        folders.recover(folder.glob(f"*{folders.REPLACED}"))
    found = newest(folder) if resume_if_exists else None
    if found is not None and found != _upstreams(folder):
        console.notice(f"a kill left more than one checkpoint to go on from; {found.name} is the newest complete one")
        resume_if_exists, resume_from_checkpoint = False, str(found)
    original(
        trainer,
        log_dir,
        resume_if_exists,
        resume_past_end,
        resume_ignore_no_checkpoint,
        dirpath,
        resume_from_checkpoint,
    )


def newest(folder: Path) -> Path | None:
    """The complete distributed checkpoint of the most steps; None where a run has ended, or none ends with -last.

    One whose name does not say its step counts if it ends with -last, and is as old as its folder.
    """
    complete = _complete(folder)
    if any(path.match("*end") for path in complete) or not any(path.match("*last") for path in complete):
        return None
    named = [path for path in complete if STEP.search(path.name)]
    return max(named or [path for path in complete if path.match("*last")], key=_age)


def _upstreams(folder: Path) -> Path | None:
    """The one that upstream takes."""
    last = [path for path in _complete(folder) if path.match("*last")]
    return last[0] if len(last) == 1 else None


def _complete(folder: Path) -> list[Path]:
    """What has its name has all of its files (lightning/strategy.py); a mark says that it is being removed."""
    found = (path for path in folder.glob("*") if (path / "metadata.json").is_file())
    return [path for path in found if path.suffix != ".incomplete" and not _marked(path)]


def _marked(path: Path) -> bool:
    return bool(NeMoModelCheckpoint.is_checkpoint_unfinished(path))


def _age(path: Path) -> tuple[int, bool, float]:
    step = STEP.search(path.name)
    return int(step[1]) if step else -1, path.match("*last"), path.stat().st_mtime
