"""Imported by the one-line .pth file when NXDT_NEMO is set: arms the backend before the script starts.

An error must not end every Python process of the environment with a traceback: it is said in one line.
"""

import os
import sys

from nxdt_nemo.errors import UserError

if os.environ.get("NXDT_NEMO", "") not in ("", "0"):
    try:
        from nxdt_nemo._activation import activate

        activate()
    except UserError as error:
        print(f"nxdt_nemo: {error}", file=sys.stderr)
        os._exit(error.exit_code)
