"""A SLURM batch script: one task a node, torchrun in each, and back into the queue when a node or the time runs out.

Room config/ (leaf). Stands in for NNM's run.slurm. Proof: tests/config/test_launch.py, tests/nemo/test_nodes.py.
"""

from __future__ import annotations

from nxdt_nemo.config.launch import shell
from nxdt_nemo.config.launch.plan import PORT, Launch

__all__ = ["batch", "files"]

NOTICE = 120  # seconds before the time limit at which SLURM tells the script


def files(launch: Launch) -> dict[str, str]:
    """`NAME.sbatch`."""
    return {f"{launch.name}.sbatch": batch(launch)}


def batch(launch: Launch) -> str:
    """The script's text."""
    command = shell.torchrun(launch, node='"$SLURM_NODEID"')
    cores = [f"#SBATCH --cpus-per-task={launch.instance.vcpus}"] if launch.instance is not None else []
    usage = (
        "The configuration, the script and the virtual environment are on storage that all nodes share. Start it:",
        f"  sbatch [-p PARTITION] [-t TIME] {launch.name}.sbatch [override...]",
    )
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name={launch.name}",
        f"#SBATCH --nodes={launch.nodes}",
        "#SBATCH --ntasks-per-node=1",
        *cores,
        "#SBATCH --exclusive",
        "#SBATCH --output=%x-%j.out",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        f"#SBATCH --signal=B:USR1@{NOTICE}",
        *shell.heading(launch, *usage),
        "set -euo pipefail",
        "",
        'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        f'export MASTER_ADDR="${{hosts[0]}}" MASTER_PORT="${{MASTER_PORT:-{PORT}}}"',
        "",
        *shell.limits(),
        "",
        *shell.environment(launch),
        "",
        "# shellcheck disable=SC2329  # bash -c calls it below",
        "node() {",
        *(f"  {line}" for line in shell.literal(launch)),
        f"  exec {command[0]}",
        *(f"  {line}" for line in command[1:]),
        "}",
        "export -f node",
        "",
        "# Back into the queue, at most RESTARTS times: NeMo goes on from its last checkpoint. A job that fails in its",
        "# first SETTLED seconds has a mistake in it, which another start would meet again.",
        "again() {",
        '  if [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-100}" ]; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "  else",
        '    echo "not put back: $SLURM_RESTART_COUNT restarts" >&2',
        "  fi",
        "}",
        "trap 'echo \"the time is nearly up\" >&2; again; exit 0' USR1",
        "",
        "# In the background, since bash runs a trap only while it waits.",
        'srun --kill-on-bad-exit=1 bash -c \'node "$@"\' node "$@" &',
        "code=0",
        "wait $! || code=$?",
        'if [ "$code" -ne 0 ] && [ "$SECONDS" -ge "${SETTLED:-600}" ]; then',
        "  again",
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"
