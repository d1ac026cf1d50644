"""A Lightning callback that notes what each step made XLA do.

Room testing/. Counters are runtime/xla/metrics.py's. Proof: tests/nemo/test_preference.py, test_sft_data.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

__all__ = ["Counts"]


class Counts(Callback):
    """Of each training step the graphs compiled and executed, tensors read, and operations that fell off XLA.

    file  where they go as a JSON list when training ends
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.parts: list[dict[str, int]] = []
        self._before: dict[str, int] = {}

    def on_train_batch_end(self, *_: Any) -> None:
        from nxdt_nemo.runtime.xla.metrics import counters

        now = counters()
        self.parts.append({key: now[key] - self._before.get(key, 0) for key in now})
        self._before = now

    def on_fit_end(self, *_: Any) -> None:
        self.file.write_text(json.dumps(self.parts), encoding="utf-8")
