"""A pretraining script as a NeMo user writes it, with a callback that saves where it is told and notes what was read.

SAVES_AT   places, comma separated: `step 3` in the hook at a step's end, `validation 2` in the one after a validation
SAVES_TO   the folder of these checkpoints
NOTES      a file a rank, one JSON line a step: its loss, grad norm and learning rate as logged, and what data it read
"""

import hashlib
import json
import os

import torch.multiprocessing as mp
from lightning.pytorch import Callback
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

mp.set_start_method("spawn", force=True)


class Saves(Callback):
    """Beside NeMo's own checkpoint callback, which saves in one of the two places only."""

    def __init__(self) -> None:
        self.places = os.environ.get("SAVES_AT", "").split(",")

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, f"step {trainer.global_step}")

    def on_validation_end(self, trainer, *_):
        self.save(trainer, f"validation {trainer.global_step}")

    def save(self, trainer, place):
        if place in self.places:
            samples = trainer.callback_metrics["consumed_samples"]
            name = f"{place.replace(' ', '=')}-consumed_samples={samples}"
            trainer.save_checkpoint(f"{os.environ['SAVES_TO']}/{name}.ckpt")


class Notes(Callback):
    """What each rank reads and logs."""

    def __init__(self) -> None:
        self.read = hashlib.sha256()

    def on_train_start(self, trainer, module):
        gpt = module.model[0] if isinstance(module.model, list) else module.model
        while hasattr(gpt, "module"):
            gpt = gpt.module
        gpt.register_forward_pre_hook(self.see, with_kwargs=True)
        self.file = open(f"{os.environ['NOTES']}.{trainer.global_rank}", "a")  # noqa: SIM115 - until the process ends

    def see(self, gpt, args, named):
        if gpt.training and named.get("input_ids") is not None:
            self.read.update(named["input_ids"].numpy().tobytes())

    def on_train_batch_end(self, trainer, *_):
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name in LOGGED}
        line = {"step": trainer.global_step, "epoch": trainer.current_epoch, "read": self.read.hexdigest(), **logged}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.read = hashlib.sha256()


LOGGED = ("reduced_train_loss", "grad_norm", "lr", "consumed_samples")


@hydra_runner(config_path="../../configs", config_name="demo_llama")
def main(cfg: DictConfig) -> None:
    callbacks = [Saves(), Notes()] if "NOTES" in os.environ else []
    trainer = MegatronTrainerBuilder(cfg).create_trainer(callbacks)
    exp_manager(trainer, cfg.exp_manager)
    trainer.fit(MegatronGPTModel(cfg.model, trainer))


if __name__ == "__main__":
    main()
