"""bash: the parts that all launch scripts have.

Room config/ (leaf). May import the room's own modules. Proof: tests/config/test_launch.py, which runs what it makes.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

from nxdt_nemo.config.environment import Setting
from nxdt_nemo.config.launch.plan import Launch
from nxdt_nemo.config.validate import hydra_options

__all__ = ["environment", "heading", "limits", "literal", "torchrun"]

WIDTH = 110


def heading(launch: Launch, *usage: str) -> list[str]:
    """Comment lines: what this is, how it was written, how to start it."""
    lines = [f"{launch.name}: {launch.where}. Written by", f"  {launch.command}", *usage]
    return [f"# {line}".rstrip() for line in lines]


def limits() -> list[str]:
    """Open files: every rank holds its checkpoint's shards, its data files and its sockets."""
    return [
        "# Each rank opens data files, checkpoint shards and sockets; the default limit is 1024.",
        'ulimit -n 65535 2>/dev/null || ulimit -n "$(ulimit -Hn)"',
        "",
        "# A virtual environment, where the command nxdt-nemo is in one: VENV=/path/to/.venv",
        'if [ -n "${VENV:-}" ]; then',
        "  # shellcheck disable=SC1091",
        '  . "$VENV/bin/activate"',
        "fi",
    ]


def environment(launch: Launch) -> list[str]:
    """Export lines with reasons and sources; a variable that is set stays as it is."""
    lines = [
        "# The lane; without it this release would take the cpu lane.",
        f'export NXDT_NEMO_RUNTIME="${{NXDT_NEMO_RUNTIME:-{launch.job.lane}}}"',
    ]
    for setting in launch.settings:
        dollar = "$" in setting.value and not setting.variable.shell
        lines += ["", *_why(setting), *(["# shellcheck disable=SC2016"] if dollar else []), _export(setting)]
    return lines


def _why(setting: Setting) -> Iterator[str]:
    by = "" if setting.by == "the table" else f" ({setting.by})"
    for line in textwrap.wrap(f"{setting.variable.reason}{by}", WIDTH):
        yield f"# {line}"
    if setting.variable.source:
        yield f"# {setting.variable.source}"


def _export(setting: Setting) -> str:
    value = setting.value if setting.variable.shell else _escaped(setting.value)
    return f'export {setting.name}="${{{setting.name}:-{value}}}"'


def _escaped(text: str) -> str:
    """Literal text inside "${NAME:-...}"."""
    return "".join(f"\\{letter}" if letter in '\\"$`}' else letter for letter in text)


def literal(launch: Launch) -> list[str]:
    """The word to shellcheck that an override with $ in it is hydra's to expand."""
    return ["# shellcheck disable=SC2016"] if any("$" in override for override in launch.overrides) else []


def torchrun(launch: Launch, *, node: str, composed: str = "") -> list[str]:
    """The command of a node as lines that end in a backslash, but for the last; further overrides are its "$@".

    node      shell expression of the node's number
    composed  path on the node of the composed configuration, which has the user's overrides in it; "" for launch.config
    """
    path = Path(composed or launch.config)
    if launch.script is None:
        program = f"-m nxdt_nemo run --config {shlex.quote(str(path))}"
    else:
        program = shlex.join([launch.script, *hydra_options(path)])
    words = [
        f"torchrun --nnodes={launch.nodes} --nproc-per-node={launch.ranks} --node-rank={node}",
        '  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"',
        f"  {program}",
        *(f"  {shlex.quote(override)}" for override in (() if composed else launch.overrides) + launch.sizes),
        '  "$@"',
    ]
    return [f"{line} \\" for line in words[:-1]] + words[-1:]
