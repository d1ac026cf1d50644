"""Our script for preferences with a callback that notes what each step made XLA do, in the JSON file COUNTS.

Named as the script it stands for: the pre-check knows by the name that it trains by neuron.alignment.
"""

import os
from pathlib import Path

import torch.multiprocessing as mp
from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nxdt_nemo.nemo.examples.megatron_alignment import train
from nxdt_nemo.testing.xla_counts import Counts

mp.set_start_method("spawn", force=True)


@hydra_runner(config_path=".", config_name="pairs")
def main(cfg: DictConfig) -> None:
    train(cfg, [Counts(Path(os.environ["COUNTS"]))])


if __name__ == "__main__":
    main()
