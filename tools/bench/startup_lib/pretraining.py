"""NeMo's megatron_gpt_pretraining.py, line by line, with a stopwatch; started by tools/bench/startup.py.

BENCH_START is the time of the command, BENCH_MARKS the file to write; both are seconds since the epoch's.
"""

import json
import os
import time

start = float(os.environ["BENCH_START"])
marks = {"python and backend": time.time() - start}

import torch.multiprocessing as mp  # noqa: E402
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel  # noqa: E402
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder  # noqa: E402
from nemo.core.config import hydra_runner  # noqa: E402
from nemo.utils import logging  # noqa: E402
from nemo.utils.exp_manager import exp_manager  # noqa: E402
from omegaconf.omegaconf import OmegaConf  # noqa: E402

mp.set_start_method(os.environ.get("BENCH_METHOD", "spawn"), force=True)
marks["imports"] = time.time() - start
if os.environ.get("BENCH_ONLY_IMPORTS"):
    raise SystemExit

from lightning.pytorch import Callback  # noqa: E402


class Stopwatch(Callback):
    """The first step's time, then that of a checkpoint, which is the process's first."""

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 1 and __name__ == "__main__":
            marks["first step"] = time.time() - start
            trainer.save_checkpoint(os.environ["BENCH_MARKS"] + "_first.ckpt")
            marks["first save"] = time.time() - start
            with open(os.environ["BENCH_MARKS"], "w") as file:
                json.dump(marks, file)


@hydra_runner(config_path="conf", config_name="megatron_gpt_config")
def main(cfg) -> None:
    marks["configuration"] = time.time() - start
    logging.info("\n\n************** Experiment configuration ***********")
    logging.info(f"\n{OmegaConf.to_yaml(cfg)}")

    trainer = MegatronTrainerBuilder(cfg).create_trainer([Stopwatch()])
    exp_manager(trainer, cfg.exp_manager)
    marks["trainer"] = time.time() - start

    model = MegatronGPTModel(cfg.model, trainer)
    marks["model"] = time.time() - start

    trainer.fit(model)


if __name__ == "__main__":
    main()
