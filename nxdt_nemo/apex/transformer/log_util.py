"""The log level of apex.transformer.

Room apex/. NeMo sets it from `model.apex_transformer_log_level`. Proof: tests/apex/test_transformer.py.
"""

from __future__ import annotations

import logging

__all__ = ["get_transformer_logger", "set_logging_level"]

_ROOT = "nxdt_nemo.apex"


def get_transformer_logger(name: str) -> logging.Logger:
    """A logger below this room's."""
    return logging.getLogger(f"{_ROOT}.{name.rpartition('.')[2]}")


def set_logging_level(verbosity: int | str) -> None:
    """Set the level of all loggers of this room."""
    logging.getLogger(_ROOT).setLevel(verbosity)
