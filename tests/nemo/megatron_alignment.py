"""Our script for preferences with a callback that notes what each step made XLA do, in the JSON file COUNTS.

Named as the script it stands for: the pre-check knows by the name that it trains by neuron.alignment.
"""

import json
import os
from pathlib import Path

import torch.multiprocessing as mp
from lightning.pytorch import Callback
from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nxdt_nemo.nemo.examples.megatron_alignment import train

mp.set_start_method("spawn", force=True)


class Counts(Callback):
    def __init__(self):
        self.parts, self.before = [], {}

    def on_train_batch_end(self, *_):
        from nxdt_nemo.runtime.xla.metrics import counters

        now = counters()
        self.parts.append({key: now[key] - self.before.get(key, 0) for key in now})
        self.before = now

    def on_fit_end(self, *_):
        Path(os.environ["COUNTS"]).write_text(json.dumps(self.parts))


@hydra_runner(config_path=".", config_name="pairs")
def main(cfg: DictConfig) -> None:
    train(cfg, [Counts()])


if __name__ == "__main__":
    main()
