"""A user's script for NeMo 2.0: llm.finetune (`peft`: none or lora) of the Llama that was imported to `source`, on the
questions and answers in `data`."""

from nemo import lightning as nl
from nemo.collections import llm
from parts import Asked
from small_llama import CONFIG


def main() -> None:
    asked = Asked.here()
    llm.finetune(
        model=llm.LlamaModel(llm.LlamaConfig(**CONFIG, calculate_per_token_loss=True)),  # as NeMo wants it with CP
        data=llm.FineTuningDataModule(
            asked.data, seq_length=CONFIG["seq_length"], micro_batch_size=1, global_batch_size=4, num_workers=0
        ),
        peft=llm.peft.PEFT_STR2CLS[asked.peft]() if asked.peft != "none" else None,
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=asked.source), resume_if_exists=True),
        tokenizer="model",
        **asked.arguments(),
    )


if __name__ == "__main__":
    main()
