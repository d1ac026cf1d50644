"""NeMo's configuration, checked and made fit for this backend before the script's main function sees it.

Room nemo/. Wraps nemo.core.config.hydra_runner.hydra_runner. Proof: tests/nemo/test_bad_input.py.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nxdt_nemo import console

__all__ = ["hydra_runner", "prepare"]


def hydra_runner(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The decorator, with `prepare` before the decorated function.

    Hydra follows `__wrapped__` to the script's own function, so its `config_path` stays relative to it.
    """
    decorate = original(*args, **kwargs)

    def decorator(task: Callable[[Any], Any]) -> Any:
        @functools.wraps(task)
        def prepared(cfg: Any) -> Any:
            prepare(cfg, Path(inspect.getfile(inspect.unwrap(task))))
            return task(cfg)

        return decorate(prepared)

    return decorator


def prepare(cfg: Any, script: Path | None = None) -> None:
    """Check a whole NeMo configuration and apply what this backend changes in it; report once, on rank 0.

    script  where the task is written: the keys that it reads itself are known keys
    Nothing happens for a configuration that asks for another accelerator. Raises ConfigError, the last of
    the mistakes found; the others are printed.
    """
    from nxdt_nemo.config import names_in, sanitise, world_size
    from nxdt_nemo.config.checks import lightnings_sampler
    from nxdt_nemo.config.rules import apply
    from nxdt_nemo.config.view import View
    from nxdt_nemo.megatron import memory_of_config

    if cfg.get("trainer") is None:
        return
    if cfg.get("model") is None:  # a script that restores one: what Lightning itself would refuse
        apply(cfg, lightnings_sampler(View(cfg)))
        return
    also = names_in(script) if script is not None else frozenset()
    ranks = world_size(cfg, os.environ)
    report = sanitise(cfg, world_size=ranks, also=also)
    if not report.errors:
        report.errors += memory_of_config.errors(View(cfg), ranks)
    if report.errors:
        *first, last = report.errors
        for error in first:
            console.notice(str(error))
        raise last
    report.show()
    if cfg.trainer.get("accelerator") != "cpu":
        from nxdt_nemo.nemo.core.config.restore import import_checkpoints

        import_checkpoints(cfg)
