"""The self-test's training script: upstream's calls in upstream's order, as a NeMo user writes them.

Room testing/. Started by training.py in processes of its own, never imported.
"""

import os

from lightning.pytorch import Callback
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig


class Stops(Callback):
    """Ends the run before step SELFTEST_STOP, with the schedule and the data of all its steps."""

    def on_train_batch_start(self, trainer, module, batch, index):  # type: ignore[no-untyped-def]
        if trainer.global_step != int(os.environ.get("SELFTEST_STOP", "-1")):
            return None
        trainer.should_stop = True
        return -1


@hydra_runner(config_path=".", config_name="none")  # type: ignore[untyped-decorator]
def main(cfg: DictConfig) -> None:
    trainer = MegatronTrainerBuilder(cfg).create_trainer([Stops()])
    exp_manager(trainer, cfg.exp_manager)
    trainer.fit(MegatronGPTModel(cfg.model, trainer))


if __name__ == "__main__":
    main()
