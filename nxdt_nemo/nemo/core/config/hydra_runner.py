"""NeMo's configuration, checked and made fit for this backend before the script's main function sees it.

Room nemo/. Wraps nemo.core.config.hydra_runner.hydra_runner. Proof: tests/nemo/test_bad_input.py.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from nxdt_nemo import console

__all__ = ["hydra_runner", "prepare"]

NEURON_ACCELERATORS = ("neuron", "gpu", "cuda", "auto", "tpu")


def hydra_runner(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The decorator, with `prepare` before the decorated function.

    Hydra follows `__wrapped__` to the script's own function, so its `config_path` stays relative to it.
    """
    decorate = original(*args, **kwargs)

    def decorator(task: Callable[[Any], Any]) -> Any:
        @functools.wraps(task)
        def prepared(cfg: Any) -> Any:
            prepare(cfg)
            return task(cfg)

        return decorate(prepared)

    return decorator


def prepare(cfg: Any) -> None:
    """Check a whole NeMo configuration and apply what this backend changes in it; report once, on rank 0.

    Nothing happens for a configuration that asks for another accelerator. Raises ConfigError, the first
    of the mistakes found.
    """
    from nxdt_nemo.config import sanitise, world_size

    accelerator = (cfg.get("trainer") or {}).get("accelerator", "auto")
    if accelerator not in NEURON_ACCELERATORS or cfg.get("model") is None:
        return
    report = sanitise(cfg, world_size=world_size(cfg, os.environ))
    for error in report.errors[1:]:
        console.notice(str(error))
    if report.errors:
        raise report.errors[0]
    text = report.render()
    if text:
        console.once(text, key="config-report")
