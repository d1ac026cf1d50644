"""Imported by the one-line .pth file when NXDT_NEMO is set: arms the backend before the script starts.

A mistake of the user's must not end every Python process of the environment with a traceback: it is said
in one line, at activation and later in the script. Nor may it pass: Python prints what a .pth file raises and
goes on, without the backend. Proof: tests/test_activation.py.
"""

import os
import sys

from nxdt_nemo import console
from nxdt_nemo.errors import NxdtError

if os.environ.get("NXDT_NEMO", "") not in ("", "0"):
    try:
        from nxdt_nemo._activation import activate
        from nxdt_nemo.cli.early import plain_start
        from nxdt_nemo.cli.run import install_hook

        plain_start(sys.orig_argv)
        activate()
        install_hook()
    except NxdtError as error:
        if console.is_rank_zero():
            print(f"nxdt-nemo: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(getattr(error, "exit_code", 1))
