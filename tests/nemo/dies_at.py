"""gpt_pretraining.py whose ranks are killed without warning at the start of step DIE_AT, or in a save."""

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


class Dies(Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == int(os.environ["DIE_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)


def die_in_save() -> None:
    """At the first save after DIE_AT steps, die when the shards are on disk but the checkpoint is not named."""
    from nxdt_nemo.lightning import strategy

    def killed(partial, folder):
        os.kill(os.getpid(), signal.SIGKILL)

    real = strategy._commit
    strategy._commit = lambda partial, folder: (
        killed(partial, folder) if f"step={os.environ['DIE_IN_SAVE']}" in folder.name else real(partial, folder)
    )


@hydra_runner(config_path="../../configs", config_name="demo_llama")
def main(cfg: DictConfig) -> None:
    callbacks = [Dies()] if "DIE_AT" in os.environ else []
    if "DIE_IN_SAVE" in os.environ:
        die_in_save()
    trainer = MegatronTrainerBuilder(cfg).create_trainer(callbacks)
    exp_manager(trainer, cfg.exp_manager)
    trainer.fit(MegatronGPTModel(cfg.model, trainer))


if __name__ == "__main__":
    main()
