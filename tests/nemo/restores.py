"""Continued training as NeMo's own megatron_gpt_pretraining.py has it, and what each rank was given, saved again.

The calls are upstream's, in its order; a callback saves a checkpoint in START before the first step.
"""

import os
from pathlib import Path

import torch.multiprocessing as mp
from lightning.pytorch import Callback
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

mp.set_start_method("spawn", force=True)


class Saves(Callback):
    def on_train_start(self, trainer, module):
        trainer.save_checkpoint(os.environ["START"])


@hydra_runner(config_path="../../configs", config_name="demo_llama")
def main(cfg: DictConfig) -> None:
    trainer = MegatronTrainerBuilder(cfg).create_trainer([Saves()])
    exp_manager(trainer, cfg.exp_manager)
    if cfg.model.get("restore_from_path") is not None:
        model = MegatronGPTModel.restore_from(
            restore_path=cfg.model.restore_from_path,
            override_config_path=MegatronGPTSFTModel.merge_cfg_with(cfg.model.restore_from_path, cfg),
            trainer=trainer,
            save_restore_connector=NLPSaveRestoreConnector(),
        )
    elif cfg.model.get("restore_from_ckpt") is not None:
        trainer.ckpt_path = Path(cfg.model.restore_from_ckpt)
        model = MegatronGPTModel(cfg.model, trainer)
    else:
        model = MegatronGPTModel(cfg.model, trainer)
    trainer.fit(model)


if __name__ == "__main__":
    main()
