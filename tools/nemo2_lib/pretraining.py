"""A user's script for NeMo 2.0: llm.pretrain of a small GPT or Llama (`family`) on mock data."""

from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.gpt.data.mock import MockDataModule
from nemo.lightning.io.mixin import IOMixin
from parts import Asked

SEQUENCE = 64


class Numbers(IOMixin):
    """A tokenizer of numbers, as the mock data wants one."""

    vocab_size, eod, eos_id, bos_id = 1000, 999, 999, 998
    unique_identifiers = {"class": "Numbers"}


def main() -> None:
    asked = Asked.here()
    sizes = {"num_layers": asked.layers, "hidden_size": 64, "num_attention_heads": 4, "seq_length": SEQUENCE}
    if asked.family == "gpt":
        config = llm.GPTConfig(**sizes, ffn_hidden_size=256, hidden_dropout=0.0, attention_dropout=0.0)
        model = llm.GPTModel(config, tokenizer=Numbers())
    else:
        model = llm.LlamaModel(llm.LlamaConfig(**sizes, ffn_hidden_size=176, num_query_groups=2), tokenizer=Numbers())
    llm.pretrain(
        model=model,
        data=MockDataModule(
            seq_length=SEQUENCE, global_batch_size=4, micro_batch_size=1, num_workers=0, tokenizer=Numbers()
        ),
        resume=nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
        **asked.arguments(),
    )


if __name__ == "__main__":
    main()
