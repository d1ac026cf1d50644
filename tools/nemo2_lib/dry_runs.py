"""`dry_runs.py FOLDER`: each of NeMo's performance scripts up to what it hands to Slurm (--dryrun), in one process.

Prints `DRY name` or `REFUSED name: reason`.
"""

import importlib
import runpy
import sys
from pathlib import Path

ARGUMENTS = "--account none --partition none --gpu h100 --dryrun"


def main(folder: Path) -> None:
    sys.path.insert(0, str(folder.parents[2]))
    importlib.import_module("scripts.performance.argument_parser")
    for script in sorted(folder.glob("[!_]*.py")):
        sys.argv = [str(script), *ARGUMENTS.split()]
        try:
            runpy.run_module(f"scripts.performance.llm.{script.stem}", run_name="__main__")
        except (Exception, SystemExit) as error:
            print(f"REFUSED {script.stem}: {' '.join(str(error).split())[:200] or type(error).__name__}")
        else:
            print(f"DRY {script.stem}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
