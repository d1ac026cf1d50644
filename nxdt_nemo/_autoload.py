"""Imported by the one-line .pth file when NXDT_NEMO is set: arms the backend before the script starts.

A mistake of the user's must not end every Python process of the environment with a traceback: it is said
in one line, at activation and later in the script.
"""

import os
import sys

from nxdt_nemo import console
from nxdt_nemo.errors import UserError

if os.environ.get("NXDT_NEMO", "") not in ("", "0"):
    try:
        from nxdt_nemo._activation import activate
        from nxdt_nemo.cli.run import install_hook

        activate()
        install_hook()
    except UserError as error:
        if console.is_rank_zero():
            print(f"nxdt-nemo: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
