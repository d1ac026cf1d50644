"""NNM's converters and serialization, unchanged, on what a test laid out: `nnm.py SOURCE WORK`, run by stubs.py.

WORK has hf/pytorch_model.bin and config.json of a Llama, and ours/. Writes theirs/NAME and read/NAME. One line of the
converter to Hugging Face is taken in that its authors left as a comment: the head's name.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

root, work = Path(sys.argv[1]) / "nemo", Path(sys.argv[2])
SCRIPTS = "examples.nlp.language_modeling.checkpoint_conversion"
PARTS = "nemo.collections.nlp.parts"


def load(package: str, name: str, folder: Path, *changes: tuple[str, str]) -> Any:
    words = package.split(".")
    for end in range(1, len(words) + 1):
        inner = sys.modules.setdefault(".".join(words[:end]), types.ModuleType(words[end - 1]))
        inner.__path__ = []
        if end > 1:
            setattr(sys.modules[".".join(words[: end - 1])], words[end - 1], inner)
    path = folder / f"{name}.py"
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    module = types.ModuleType(f"{package}.{name}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    setattr(sys.modules[package], name, module)
    exec(compile(text, path, "exec"), module.__dict__)
    return module


parts, scripts = root / "nemo/collections/nlp/parts", root / SCRIPTS.replace(".", "/")
load(PARTS, "checkpoint_storage", parts)
load(PARTS, "serialization", parts)
load(SCRIPTS, "logger_factory", scripts)
load(SCRIPTS, "convert_hf_checkpoint_to_nemo_llama", scripts)
writer = load(SCRIPTS, "convert_hf_checkpoint_to_nemo_llama_70b", scripts)
head = '"output_layer.weight": (1, "lm_head'
reader = load(SCRIPTS, "convert_nemo_checkpoint_to_hf_llama", scripts, ("# " + head, head))

config = json.loads((work / "config.json").read_text())
for name, xser, fused in (("split", False, False), ("fused_xser", True, True)):
    given = SimpleNamespace(
        tp_degree=2,
        pp_degree=2,
        vpp_degree=None,
        path_to_checkpoint=str(work / "hf"),
        model_bin_file=None,
        num_shards=1,
        save_bf16=False,
        gqa_qkv=fused,
        output_path=str(work / "theirs" / name),
        step=7,
        is_xser=xser,
    )
    for stage in range(2):
        writer.convert_checkpoint(stage, given, config)
for name, xser in (("split", False), ("fused", False), ("xser", True)):
    out = str(work / "read" / name)
    reader.convert_checkpoint(str(work / "config.json"), str(work / "ours" / name), out, 2.0, xser, None, True)
