"""tools/nemo2_lib/pretraining.py with a callback that notes what each step made XLA do, in the JSON file COUNTS."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "nemo2_lib"))
import pretraining
from parts import Asked

from nxdt_nemo.testing.xla_counts import Counts


class Counted(Asked):
    """What was asked for, with the callback before the script's own."""

    def arguments(self):
        found = super().arguments()
        found["trainer"].callbacks.insert(0, Counts(Path(os.environ["COUNTS"])))
        return found


pretraining.Asked = Counted
if __name__ == "__main__":
    pretraining.main()
