"""torch-xla's compilation cache on disk, and what a process asked of it.

Room runtime/. On XLA:CPU, torch_xla 2.9 writes compiled graphs there and finds them again by their hashes, but XLA's
CPU client cannot read them ("Deserializing serialized executable not supported"): a graph that is found is compiled
all the same. Neuron has a cache of its own, of which torch-xla's counters say nothing.
Proof: tests/cli/test_compile.py.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path

from nxdt_nemo.console import global_rank

__all__ = ["FOLDER", "REPORT", "watch"]

FOLDER = "XLA_PERSISTENT_CACHE_PATH"
REPORT = "NXDT_NEMO_COMPILE_REPORT"
"""A folder: each rank writes its counts there when it ends."""


def watch() -> None:
    """Write rank-N.json into the folder that REPORT names, when this process ends; nothing where it names none."""
    folder = os.environ.get(REPORT)
    if folder:
        atexit.register(_write, Path(folder))


def _write(folder: Path) -> None:
    if sys.modules.get("torch_xla") is None:
        return
    import torch_xla.debug.metrics as met

    def count(name: str) -> int:
        return int(met.counter_value(name) or 0)

    found = {
        "graphs": count("UncachedCompile"),
        "missed": count("PersistentCacheMiss"),
        "unreadable": count("PersistentCacheDeserializeFailure"),
    }
    (folder / f"rank-{global_rank()}.json").write_text(json.dumps(found))
