"""A user's script for NeMo 2.0: llm.llama3_8b's own recipes, made small, by nemo_run: `recipe.py HOW FOLDER [SOURCE]`.

HOW  direct, local (an executor: torchrun on two ranks), fast (performance_mode), or finetune of the Llama at SOURCE
"""

import sys
from typing import Any

import nemo_run as run
from nemo.collections import llm
from small_llama import CONFIG

STEPS = 3


def small(recipe: Any, ranks: int, source: str) -> Any:
    """Its sizes by its own fields."""
    for name, value in CONFIG.items():
        if source or name != "vocab_size":  # else the tokenizer's
            setattr(recipe.model.config, name, value)
    recipe.data.seq_length = CONFIG["seq_length"]
    recipe.data.global_batch_size = 4
    recipe.data.num_workers = 0
    recipe.trainer.max_steps = recipe.trainer.val_check_interval = STEPS
    recipe.trainer.limit_val_batches = 1
    recipe.trainer.log_every_n_steps = 1
    recipe.trainer.strategy.context_parallel_size = 1
    recipe.trainer.strategy.tensor_model_parallel_size = ranks
    return recipe


def main(how: str, folder: str, source: str = "") -> None:
    ranks = 2 if how == "local" else 1
    named = {"dir": folder, "name": how, "num_gpus_per_node": ranks, "performance_mode": how == "fast"}
    if how == "finetune":
        recipe = llm.llama3_8b.finetune_recipe(**named, seq_length=CONFIG["seq_length"])
        recipe.resume.restore_config.path = source
    else:
        recipe = llm.llama3_8b.pretrain_recipe(**named)
    recipe = small(recipe, ranks, source)
    if how == "local":
        run.run(recipe, executor=run.LocalExecutor(ntasks_per_node=ranks, launcher="torchrun"), name="small")
    else:
        run.run(recipe, direct=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
