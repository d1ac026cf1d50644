"""Launch scripts of `nxdt-nemo launch`, run: two nodes of two ranks on this host train as one node of four.

The script is NeMo's own, started as `python script.py` with NXDT_NEMO=1. A SLURM cluster is srun and scontrol that
start its two nodes here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nxdt_nemo.testing.script_run import LAUNCHER, Run, tiny

from .conftest import SCRIPT

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.timeout(3600)]

SRUN = """#!/usr/bin/env bash
# Both nodes of the cluster are this host.
shift
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && printf '127.0.0.1\\n127.0.0.1\\n'
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Cluster:
    """This host as two nodes: the launch script of a tiny Llama, and its runs."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        run = f'#!/usr/bin/env bash\nexec "{sys.executable}" -m torch.distributed.run "$@"\n'
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": run}.items():
            (bin_folder / name).write_text(text)
            (bin_folder / name).chmod(0o755)
        inherited = {name: value for name, value in os.environ.items() if name not in {*LAUNCHER, "NXDT_NEMO"}}
        self.environment = inherited | {"PATH": f"{bin_folder}:{inherited['PATH']}", "MASTER_PORT": free_port()}

    def script(self, on: str, results: Path, *, nodes: int, ranks: int) -> Path:
        """What `nxdt-nemo launch` writes for this job."""
        config, *overrides = (word for word in tiny(self.corpus, results) if not word.startswith("--config-name"))
        yaml = Path(config.partition("=")[2], "demo_llama.yaml")
        words = [
            "launch",
            str(yaml),
            *overrides,
            *STEPS,
            f"trainer.devices={ranks}",
            "model.tensor_model_parallel_size=2",
        ]
        options = ["--on", on, "--script", str(SCRIPT), "--target", "cpu", "--nodes", str(nodes)]
        done = subprocess.run(
            [sys.executable, "-m", "nxdt_nemo", *words, *options],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        file = self.folder / f"{on}-{nodes}.sh"
        file.write_text(done.stdout)
        return file

    def run(self, script: Path, results: Path, *environments: dict[str, str], seconds: float = 1500) -> Run:
        """The script, started once in each environment; the first one's output and exit code count."""
        started = [
            subprocess.Popen(
                ["bash", str(script)],
                env=self.environment | environment,
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for environment in environments
        ]
        try:
            outputs = [process.communicate(timeout=seconds)[0] for process in started]
        finally:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        code = max(process.returncode for process in started)
        return Run(code, "\n".join(outputs), results)


STEPS = ("trainer.max_steps=3", "trainer.val_check_interval=3", "exp_manager.create_checkpoint_callback=false")


def test_two_nodes_train_as_one(corpus: Path, tmp_path: Path) -> None:
    cluster = Cluster(corpus, tmp_path)

    folder = tmp_path / "one"
    script = cluster.script("torchrun", folder, nodes=1, ranks=4)
    one = cluster.run(script, folder, {})
    assert one.code == 0, one.output[-3000:]
    assert len(one.curve()) == 3

    folder = tmp_path / "torchrun"
    script = cluster.script("torchrun", folder, nodes=2, ranks=2)
    nodes = [{"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1"} for node in range(2)]
    two = cluster.run(script, folder, *nodes)
    assert two.code == 0, two.output[-3000:]
    assert two.curve() == one.curve()

    folder = tmp_path / "slurm"
    script = cluster.script("slurm", folder, nodes=2, ranks=2)
    variables = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node-[0-1]"}
    batch = cluster.run(script, folder, variables | {"SLURM_JOB_NUM_NODES": "2", "SLURM_TASKS_PER_NODE": "1(x2)"})
    assert batch.code == 0, batch.output[-3000:]
    assert batch.curve() == one.curve()
