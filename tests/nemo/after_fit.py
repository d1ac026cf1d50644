"""A user's script that goes on when trainer.fit is done: saves, validates, makes a .nemo, and trains two steps more."""

import json
import shutil
from pathlib import Path

import torch.multiprocessing as mp
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

mp.set_start_method("spawn", force=True)


@hydra_runner(config_path="../../configs", config_name="demo_llama")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.exp_manager.explicit_log_dir)
    trainer = MegatronTrainerBuilder(cfg).create_trainer()
    exp_manager(trainer, cfg.exp_manager)
    model = MegatronGPTModel(cfg.model, trainer)
    trainer.fit(model)
    (last,) = (folder / "checkpoints").glob("*-last")
    shutil.copytree(last, folder / "last")
    trainer.save_checkpoint(str(folder / "after.ckpt"))
    (validated,) = trainer.validate(model)
    model.save_to(str(folder / "after.nemo"))
    trainer.fit_loop.epoch_loop.max_steps = trainer.global_step + 2
    trainer.fit(model)
    losses = [validated["val_loss"], float(trainer.callback_metrics["reduced_train_loss"])]
    (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
