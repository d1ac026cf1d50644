"""What models of Hugging Face's format answer, by transformers and peft alone.

Tool of `make demo-finetune`; a program of its own (`python answers.py QUESTIONS BASE MERGED ADAPTER`), which nothing of
nxdt_nemo takes part in. Prints JSON: for base, merged, and base with its adapter the answers and their loss.
Proof: tests/tools/test_demo_finetune.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LONGEST = 48  # tokens of an answer


def main(questions: Path, base: Path, merged: Path, adapter: Path) -> None:
    """Load each model and ask it all questions."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(base, use_fast=False)
    plain = AutoModelForCausalLM.from_pretrained(base)
    found = {"base": _asked(plain, tokenizer, pairs)}
    found["merged"] = _asked(AutoModelForCausalLM.from_pretrained(merged), tokenizer, pairs)
    found["adapter"] = _asked(PeftModel.from_pretrained(plain, str(adapter)), tokenizer, pairs)
    print(json.dumps(found))


def _asked(model: Any, tokenizer: Any, pairs: list[dict[str, str]]) -> dict[str, Any]:
    """Greedy answers, and the mean loss of the right answer's tokens, over all of them."""
    import torch

    answers, total, count = [], 0.0, 0
    with torch.no_grad():
        for pair in pairs:
            prompt, right = (tokenizer(text)["input_ids"] for text in (pair["input"], pair["output"]))
            right = [*right, tokenizer.eos_token_id]
            made = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=LONGEST,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )[0, len(prompt) :]
            answers.append(tokenizer.decode(made, skip_special_tokens=True).strip())
            logits = model(input_ids=torch.tensor([prompt + right])).logits[0, len(prompt) - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(right), reduction="sum").item()
            count += len(right)
    return {"answers": answers, "loss": total / count}


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:5]))
