"""`python -m nxdt_nemo.testing.neuron_standin FOLDER` installs the stand-in into an empty folder."""

import sys
from pathlib import Path

from nxdt_nemo.testing.neuron_standin import build

if __name__ == "__main__":
    build(Path(sys.argv[1]))
