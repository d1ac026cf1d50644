"""`nxdt-nemo ckpt convert` as a script: tools/convert_checkpoint.py SOURCE TARGET --to FORMAT [...]."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nxdt_nemo.cli.main import main

if __name__ == "__main__":
    main(["ckpt", "convert", *sys.argv[1:]])
