"""Continue a few prompts with the model that `make demo` trained, through NeMo's own `model.generate`.

    nxdt-nemo run tools/demo_generate.py --config-path=CONFIGS --config-name=demo_llama trainer.devices=1 \
        model.tensor_model_parallel_size=1 +checkpoint_dir=DIR +checkpoint_name=NAME +prompts='["The "]'

The layout may differ from the one that trained: a distributed checkpoint is resharded while it loads.
Prints a line `sample: {"prompt": ..., "text": ...}` a prompt.
"""

import json
from pathlib import Path

from lightning.pytorch import seed_everything
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.core.config import hydra_runner
from omegaconf import DictConfig

LENGTHS = {"min_length": 16, "max_length": 24}  # tokens to add
SAMPLING = {
    "use_greedy": False,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.0,
    "repetition_penalty": 1.3,
    "add_BOS": False,
    "all_probs": False,
    "compute_logprob": False,
    "end_strings": ["<|endoftext|>"],
}


@hydra_runner(config_path="../configs", config_name="demo_llama")
def main(cfg: DictConfig) -> None:
    trainer = MegatronTrainerBuilder(cfg).create_trainer()
    checkpoint = Path(cfg.checkpoint_dir) / cfg.checkpoint_name
    # The model's configuration comes with the checkpoint; keywords replace single keys of it.
    layout = {key: cfg.model[key] for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size")}
    model = MegatronGPTModel.load_from_checkpoint(str(checkpoint), trainer=trainer, **layout)
    model.freeze()
    seed_everything(cfg.model.seed)  # every rank must draw the same tokens
    output = model.generate(list(cfg.prompts), LENGTHS, SAMPLING)
    if trainer.is_global_zero:
        for prompt, text in zip(cfg.prompts, output["sentences"], strict=True):
            print("sample: " + json.dumps({"prompt": prompt, "text": text}), flush=True)


if __name__ == "__main__":
    main()
