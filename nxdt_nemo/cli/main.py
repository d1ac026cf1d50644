"""The command `nxdt-nemo`, and its one way out.

Room cli/. Imports nothing before it knows the sub-command: a checkpoint's conversion has begun before typer would have.
Proof: tests/cli/test_help.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nxdt_nemo.errors import UserError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A UserError ends as one line and exit code 2.

    A script is started after typer has returned, since typer has its own opinion about exceptions,
    Ctrl-C and sys.excepthook, and the script must meet python's.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["ckpt"]:
            from nxdt_nemo.cli import ckpt

            ckpt.main(given[1:])
        from nxdt_nemo.cli import app

        job = app.parsed(given)
    except UserError as error:
        from nxdt_nemo.cli.run import leave

        leave(error)
    job.start()
