"""A small GPT of megatron-core's layers in Lightning's Trainer: on one rank or in any layout; stopped, it goes on.

nxdt-nemo run lightning_gpt.py --steps 6
nxdt-nemo run lightning_gpt.py --steps 9 --devices 2 --tensor_model_parallel_size 2    # from step 6 on, on two
"""

import argparse
import json
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from torch.utils.data import DataLoader

from nxdt_nemo.lightning import MegatronLightningModule, NeuronMegatronStrategy

VOCABULARY, LENGTH, SAMPLES, GLOBAL_BATCH = 64, 32, 32, 8


class SmallGPT(MegatronLightningModule):
    fields = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    fields |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}

    def chunk(self, pre_process, post_process, vp_stage):
        config = TransformerConfig(**self.fields, **self.layout)
        ends = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
        return GPTModel(config, get_gpt_layer_with_transformer_engine_spec(), VOCABULARY, LENGTH, **ends)

    def forward_step(self, chunk, batch):
        return chunk(batch["tokens"], batch["positions"], attention_mask=None, labels=batch["labels"])

    def configure_optimizers(self):
        return self.megatron_optimizer(OptimizerConfig(optimizer="adam", lr=2e-3, clip_grad=1.0))

    def train_dataloader(self):
        start, step = torch.randint(1, VOCABULARY, (2, SAMPLES, 1), generator=torch.Generator().manual_seed(0))
        counting = (start + step * torch.arange(LENGTH + 1)) % VOCABULARY  # each row by steps of its own
        rows = [{"tokens": row[:-1], "labels": row[1:], "positions": torch.arange(LENGTH)} for row in counting]
        return DataLoader(rows, GLOBAL_BATCH // self.trainer.strategy.data_parallel_size, shuffle=True)


class Losses(Callback):
    """Each step's loss, in full digits."""

    def __init__(self, path):
        self.path, self.found = path, []

    def on_train_batch_end(self, trainer, *_):
        self.found.append(trainer.callback_metrics["train_loss"].item())
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.found))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("lightning_gpt"))
    for name in ("steps", "devices"):
        parser.add_argument(f"--{name}", type=int, default=1)
    for name in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context"):
        parser.add_argument(f"--{name}_parallel_size", type=int, default=argparse.SUPPRESS)
    for name in ("sequence_parallel", "distributed_optimizer"):
        parser.add_argument(f"--{name}", action="store_true")
    asked = vars(parser.parse_args())
    folder, steps, devices = (asked.pop(name) for name in ("folder", "steps", "devices"))
    folder.mkdir(parents=True, exist_ok=True)
    strategy = NeuronMegatronStrategy(micro_batch_size=2, **asked)
    callbacks = [Losses(folder / "losses.json"), ModelCheckpoint(folder, save_last=True, every_n_train_steps=3)]
    plan = {"max_epochs": -1, "max_steps": steps, "log_every_n_steps": 1, "logger": False}
    trainer = Trainer(accelerator="neuron", devices=devices, strategy=strategy, callbacks=callbacks, **plan)
    trainer.fit(SmallGPT(), ckpt_path="last")


if __name__ == "__main__":
    main()
