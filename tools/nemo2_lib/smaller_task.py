"""`smaller_task.py FILE TARGET`: a task that nemo_run wrote for a job, with a model and data of small sizes, and three
steps. All else stands as NeMo's script has it: layout, precision, optimizer, callbacks."""

import sys
from pathlib import Path

import nemo_run as run
from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

SIZES = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 176, "num_attention_heads": 4, "seq_length": 64}
WHERE_THERE = {"num_query_groups": 2, "kv_channels": 16, "moe_ffn_hidden_size": 176}
STEPS = 3


def main(file: str, target: str) -> None:
    serializer = ZlibJSONSerializer()
    task = serializer.deserialize(Path(file).read_text(encoding="utf-8"))
    model, data, trainer = task.model.config, task.data, task.trainer
    for name, size in {**SIZES, **{n: size for n, size in WHERE_THERE.items() if getattr(model, n, None)}}.items():
        setattr(model, name, size)
    data.seq_length = SIZES["seq_length"]
    # The scripts' own, but for one or two that take a model's from the hub.
    data.tokenizer = run.Config(get_nmt_tokenizer, library="null", model_name="NullTokenizer", vocab_size=512)
    task.model.tokenizer = data.tokenizer
    trainer.max_steps, trainer.log_every_n_steps = STEPS, 1
    Path(target).write_text(serializer.serialize(task), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
