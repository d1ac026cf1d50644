"""Our script for tuning with a callback that notes what each step made XLA do, in the JSON file COUNTS."""

import os
from pathlib import Path

import torch.multiprocessing as mp
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nxdt_nemo.nemo.examples.tuning import tune
from nxdt_nemo.testing.xla_counts import Counts

mp.set_start_method("spawn", force=True)


@hydra_runner(config_path=".", config_name="tuning")
def main(cfg: DictConfig) -> None:
    tune(cfg, MegatronGPTSFTModel, "tuning", [Counts(Path(os.environ["COUNTS"]))])


if __name__ == "__main__":
    main()
