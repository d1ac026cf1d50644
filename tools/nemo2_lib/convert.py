"""A user's script for NeMo 2.0: `convert.py import|export SOURCE TARGET`, from and to Hugging Face's format."""

import sys
from pathlib import Path

from nemo.collections import llm
from small_llama import CONFIG


def main(way: str, source: str, target: str) -> None:
    if way == "import":
        llm.import_ckpt(llm.LlamaModel(llm.LlamaConfig(**CONFIG)), f"hf://{source}", output_path=Path(target))
    else:
        llm.export_ckpt(Path(source), "hf", output_path=Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
