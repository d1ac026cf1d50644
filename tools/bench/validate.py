"""How long `nxdt-nemo validate` takes, as a process of its own, on the largest of our configurations.

python tools/bench/validate.py      # median of 10, with bytecode compiled before; writes docs/results/validate.md
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

from omegaconf import DictConfig, OmegaConf

from nxdt_nemo.config.compositions import compositions
from nxdt_nemo.config.validate import read

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "docs" / "results" / "validate.md"
LIMIT = 1.5
HEAVY = ("torch", "nemo", "megatron", "lightning", "numpy")
IMPORTED = f"""
import sys
from nxdt_nemo.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY!r})))
"""


def keys(node: object) -> int:
    """Keys of a configuration, at all depths."""
    plain = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else node
    return sum(1 + keys(value) for value in plain.values()) if isinstance(plain, dict) else 0


def cpu_seconds() -> float:
    """Of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    job = max(compositions(), key=lambda job: keys(read(Path("train"), job.overrides)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    arguments = ["validate", "train", *job.overrides]
    started = [sys.executable, "-m", "nxdt_nemo", *arguments]
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(ROOT / "nxdt_nemo")], env=environment, check=True)
    subprocess.run(started, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds, computed = [], []
    for _ in range(10):
        begun, before = time.perf_counter(), cpu_seconds()
        subprocess.run(started, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
        computed.append(cpu_seconds() - before)
    loaded = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments], env=environment, capture_output=True, text=True
    )
    heavy = loaded.stdout.splitlines()[-1]
    where = f"{platform.machine()}, {os.cpu_count()} cores with a load of {os.getloadavg()[0]:.0f}"
    versions = f"Python {platform.python_version()}, omegaconf {version('omegaconf')}"
    low, middle, high = min(computed), median(computed), max(computed)
    text = (
        f"`python tools/bench/validate.py`, {time.strftime('%Y-%m-%d')}, {versions}, {where}:\n"
        f"`nxdt-nemo {' '.join(arguments)}`, with {keys(read(Path('train'), job.overrides))} keys:\n"
        f"median {median(seconds):.2f} s of 10 runs ({min(seconds):.2f} to {max(seconds):.2f} s; limit {LIMIT} s),\n"
        f"of which {middle:.2f} s computing ({low:.2f} to {high:.2f}), the rest the load's.\n"
        f"Of {', '.join(HEAVY)} it imports {heavy if heavy != '[]' else 'none'}.\n"
    )
    print(text)
    RESULT.write_text(f"# Speed of validate\n\n{text}", encoding="utf-8")
    return 0 if median(seconds) < LIMIT and heavy == "[]" else 1


if __name__ == "__main__":
    sys.exit(main())
