"""`smaller.py SCRIPT ...`: a script of NeMo's on one rank, its text as it is, where the sizes that are written in it
are too large for this machine: what it builds by name gets SIZES instead of the numbers that it says."""

import functools
import sys
from collections.abc import Callable
from typing import Any

SIZES = {
    "num_layers": 2,
    "encoder_num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "seq_length": 64,
    "seq_length_dec": 32,
    "max_position_embeddings": 64,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "num_workers": 0,
}


def smaller(kind: type) -> None:
    """Let objects of a class be built with SIZES, whatever else is said."""
    built: Callable[..., None] = kind.__init__  # type: ignore[misc]

    @functools.wraps(built)
    def build(self: Any, *args: Any, **named: Any) -> None:
        built(self, *args, **{name: SIZES.get(name, value) for name, value in named.items()})

    kind.__init__ = build  # type: ignore[misc]


def main() -> None:
    from nemo.collections import llm
    from nemo.collections.llm.gpt.data import PreTrainingDataModule
    from nemo.collections.llm.t5.data import MockDataModule
    from nemo.collections.llm.t5.model.t5 import T5Config

    from nxdt_nemo.cli.run import Job

    for kind in (llm.GPTConfig, PreTrainingDataModule, MockDataModule, T5Config):
        smaller(kind)
    Job(sys.argv[1], tuple(sys.argv[2:])).start()


if __name__ == "__main__":
    main()
