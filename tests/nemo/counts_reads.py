"""gpt_pretraining.py that prints how often the host read a tensor back in steps 3 to 6, and where."""

import json
import sys

import torch.multiprocessing as mp
from lightning.pytorch import Callback
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

import nxdt_nemo.lightning.progress as progress
from nxdt_nemo.testing.host_reads import HostReads

mp.set_start_method("spawn", force=True)
progress.SECONDS = 1e9  # the bar is drawn once


class Steps(Callback):
    """Notes what had been read when steps 3 and 7 start."""

    def __init__(self, reads: HostReads) -> None:
        self.reads = reads

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == 3:
            self.reads.by_line.clear()
        elif trainer.global_step == 7:
            sys.stdout.write(f"READS {json.dumps([trainer.global_rank, dict(self.reads.by_line)])}\n")


@hydra_runner(config_path="../../configs", config_name="demo_llama")
def main(cfg: DictConfig) -> None:
    reads = HostReads()
    trainer = MegatronTrainerBuilder(cfg).create_trainer([Steps(reads)])
    exp_manager(trainer, cfg.exp_manager)
    model = MegatronGPTModel(cfg.model, trainer)
    with reads:
        trainer.fit(model)


if __name__ == "__main__":
    main()
