"""A pretraining script as a NeMo user writes it, with a callback that notes what each part of the run made XLA do.

COUNTS  a JSON file: a list of the run's parts; see runs.Counted
STOCK   "1": megatron-core's own layers, cross entropy, embedding, collectives' mappings and gradient buffers
WITHOUT the patch record that is left out, by its id
"""

import json
import os
import time

import torch.multiprocessing as mp
from lightning.pytorch import Callback

STOCK = os.environ.get("STOCK") == "1"
REPLACED = (
    "cross-entropy", "vocab-embedding", "split-first-dim", "split-last-dim", "grad-norm", "clip-grads", "grad-buffer",
    "grad-bucket-group", "get-specs",
)  # fmt: skip
left_out = {*(REPLACED if STOCK else ()), os.environ.get("WITHOUT")} - {None, ""}
if left_out:
    from nxdt_nemo import _activation

    patcher = _activation._active.patcher
    patcher._records = [record for record in patcher._records if record.id not in left_out]

from nemo.collections.nlp.models.language_modeling import megatron_gpt_model  # noqa: E402 - after the choice
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel  # noqa: E402
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder  # noqa: E402
from nemo.core.config import hydra_runner  # noqa: E402
from nemo.utils.exp_manager import exp_manager  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

mp.set_start_method("spawn", force=True)

if STOCK:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    def local_specs(name, config=None, *_, **__):
        return get_gpt_layer_local_spec(normalization=config.normalization)

    megatron_gpt_model.get_specs = local_specs


class Counts(Callback):
    """Differences of the counters and of the clock, from each hook to the next.

    Of values that were deferred, those of the logger and of the bar are told apart: when asked for, and when read.
    """

    ASKERS = {"_log_metrics": "logger", "progress_bar_metrics": "bar"}  # lightning/logger_connector.py's

    def __init__(self) -> None:
        from nxdt_nemo.runtime import current

        self.parts, self.before, self.began = [], {}, time.perf_counter()
        self.asked = {"logger": 0, "bar": 0, "arrived": 0}
        lane = current()
        defer = lane.defer

        def counted(function, *tensors):
            asker = self.ASKERS.get(getattr(function, "__qualname__", "").partition(".")[0])
            away = sum(tensor.device.type == "xla" for tensor in tensors) if asker else 0

            def arrived(*values):
                self.asked["arrived"] += away
                function(*values)

            if asker:
                self.asked[asker] += away
            defer(arrived, *tensors)

        lane.defer = counted

    def note(self, name):
        from nxdt_nemo.runtime.xla.metrics import counters

        now = counters() | self.asked | {"seconds": time.perf_counter() - self.began}
        self.parts.append({"part": name} | {key: now[key] - self.before.get(key, 0) for key in now})
        self.before = now
        with open(os.environ["COUNTS"], "w") as file:
            json.dump(self.parts, file)

    def on_train_start(self, trainer, *_):
        training_step = trainer.strategy.training_step

        def counted(*given, **named):  # where a step begins: what Lightning does before is not of it
            self.note("between" if self.parts else "set-up")
            return training_step(*given, **named)

        trainer.strategy.training_step = counted

    def on_train_batch_end(self, *_):
        self.note("step")

    def on_validation_start(self, trainer, *_):
        self.note("between")

    def on_validation_end(self, *_):
        self.note("validation")

    def on_fit_end(self, *_):
        self.note("end")


@hydra_runner(config_path="../../configs", config_name="demo_llama")
def main(cfg: DictConfig) -> None:
    trainer = MegatronTrainerBuilder(cfg).create_trainer([Counts()] if "COUNTS" in os.environ else [])
    exp_manager(trainer, cfg.exp_manager)
    trainer.fit(MegatronGPTModel(cfg.model, trainer))


if __name__ == "__main__":
    main()
