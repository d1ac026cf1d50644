"""A script that is started once on each node: two terminals, a loop over ssh, or a scheduler of one's own.

Room config/ (leaf). Proof: tests/config/test_launch.py, tests/nemo/test_nodes.py.
"""

from __future__ import annotations

from nxdt_nemo.config.launch import shell
from nxdt_nemo.config.launch.plan import PORT, Launch

__all__ = ["files"]


def files(launch: Launch) -> dict[str, str]:
    """`NAME.sh`."""
    if launch.nodes > 1:
        usage = (
            f"Start it on every node, with its number (0 to {launch.nodes - 1}) and the first one's address:",
            f"  NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash {launch.name}.sh [override...]",
        )
        first = [
            ': "${NODE_RANK:?number the nodes: 0, 1, ...}"',
            ': "${MASTER_ADDR:?the address of the first node}"',
            f'export MASTER_ADDR MASTER_PORT="${{MASTER_PORT:-{PORT}}}"',
        ]
    else:
        usage = ("Start it on the node:", f"  bash {launch.name}.sh [override...]")
        first = [
            "NODE_RANK=0",
            f'export MASTER_ADDR="${{MASTER_ADDR:-127.0.0.1}}" MASTER_PORT="${{MASTER_PORT:-{PORT}}}"',
        ]
    command = shell.torchrun(launch, node='"$NODE_RANK"')
    lines = [
        "#!/usr/bin/env bash",
        *shell.heading(launch, *usage),
        "set -euo pipefail",
        "",
        *first,
        "",
        *shell.limits(),
        "",
        *shell.environment(launch),
        "",
        *shell.literal(launch),
        f"exec {command[0]}",
        *command[1:],
    ]
    return {f"{launch.name}.sh": "\n".join(lines) + "\n"}
