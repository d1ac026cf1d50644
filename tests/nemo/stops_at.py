"""gpt_pretraining.py whose processes all get SIGTERM in step STOP_AT, as a scheduler preempts a job."""

import os
import signal

import torch.multiprocessing as mp
from lightning.pytorch import Callback
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

mp.set_start_method("spawn", force=True)


class Stops(Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.is_global_zero and trainer.global_step == int(os.environ["STOP_AT"]):
            os.killpg(0, signal.SIGTERM)


@hydra_runner(config_path="../../configs", config_name="demo_llama")
def main(cfg: DictConfig) -> None:
    trainer = MegatronTrainerBuilder(cfg).create_trainer([Stops()])
    exp_manager(trainer, cfg.exp_manager)
    trainer.fit(MegatronGPTModel(cfg.model, trainer))


if __name__ == "__main__":
    main()
