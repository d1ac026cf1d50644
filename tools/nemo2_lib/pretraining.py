"""A user's script for NeMo 2.0: a small GPT or Llama on mock data, written for GPUs. Each word is key=value: keywords
of the strategy, and `steps`, `folder`, `devices`, `family`, `precision`, `zero`. Writes losses.json into the folder."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.gpt.data.mock import MockDataModule
from nemo.lightning.io.mixin import IOMixin
from nemo.lightning.pytorch.optim.megatron import MegatronOptimizerModule

SEQUENCE = 64


class Numbers(IOMixin):
    """A tokenizer of numbers, as the mock data wants one."""

    vocab_size, eod, eos_id, bos_id = 1000, 999, 999, 998
    unique_identifiers = {"class": "Numbers"}


class Losses(Callback):
    """What each step logged, in full digits."""

    def __init__(self, path):
        self.path, self.found = path, []

    def on_train_batch_end(self, trainer, *_):
        self.found.append(float(trainer.callback_metrics["reduced_train_loss"]))
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.found))


def main():
    words = dict(word.split("=") for word in sys.argv[1:])
    folder, steps = Path(words.pop("folder")), int(words.pop("steps"))
    devices, family = int(words.pop("devices", 1)), words.pop("family", "gpt")
    half, zero = words.pop("precision", "32") == "bf16", words.pop("zero", "") == "True"
    strategy = {key: int(value) if value.isdigit() else value == "True" for key, value in words.items()}
    sizes = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": SEQUENCE}
    if family == "gpt":
        config = llm.GPTConfig(**sizes, ffn_hidden_size=256, hidden_dropout=0.0, attention_dropout=0.0)
        model = llm.GPTModel(config, tokenizer=Numbers())
    else:
        model = llm.LlamaModel(llm.LlamaConfig(**sizes, ffn_hidden_size=176, num_query_groups=2), tokenizer=Numbers())
    optimizer = OptimizerConfig(optimizer="adam", lr=2e-3, use_distributed_optimizer=zero, bf16=half)
    trainer = nl.Trainer(
        devices=devices,
        max_steps=steps,
        accelerator="gpu",
        strategy=nl.MegatronStrategy(pipeline_dtype=torch.bfloat16 if half else torch.float32, **strategy),
        plugins=nl.MegatronMixedPrecision(precision="bf16-mixed") if half else None,
        callbacks=[Losses(folder / "losses.json")],
        log_every_n_steps=1,
        limit_val_batches=1,
        val_check_interval=steps,
        num_sanity_val_steps=0,
    )
    llm.train(
        model=model,
        data=MockDataModule(
            seq_length=SEQUENCE, global_batch_size=4, micro_batch_size=1, num_workers=0, tokenizer=Numbers()
        ),
        trainer=trainer,
        log=nl.NeMoLogger(
            log_dir=str(folder),
            ckpt=nl.ModelCheckpoint(save_last=True, every_n_train_steps=steps, save_optim_on_train_end=True),
        ),
        resume=nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
        optim=MegatronOptimizerModule(config=optimizer),
    )


if __name__ == "__main__":
    main()
