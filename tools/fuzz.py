"""Thousands of seeded mistakes in our configurations, each of which `nxdt-nemo validate --strict` has to see.

    python tools/fuzz.py                      # 5,000 mutations of 10 configurations; writes docs/results/fuzz.md
    python tools/fuzz.py --count 500          # fewer; prints only
    python tools/fuzz.py --checkout PATH      # stock YAMLs of a NeMo checkout in place of ours; prints only

Exit code 1 when one was accepted silently, made an exception, or when fewer than 95 % of the typos got the right key.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_lib.mutations import KINDS, Mutation, mutate
from omegaconf import OmegaConf

from nxdt_nemo.config.compositions import Composition
from nxdt_nemo.config.keys import load as load_keys
from nxdt_nemo.config.validate import Verdict, read, validate_config

RESULT = Path(__file__).parents[1] / "docs" / "results" / "fuzz.md"
SEED = 20261127
CONFIGS = (
    Composition("gpt3_125m", "trn1", "pretrain"),
    Composition("gpt3_175b", "trn2", "pretrain"),
    Composition("llama2_7b", "trn1", "pretrain"),
    Composition("llama3_8b", "trn2", "sft"),
    Composition("llama3_1_405b", "trn1", "pretrain"),
    Composition("llama3_70b", "trn2", "lora"),
    Composition("mistral_7b", "cpu", "pretrain"),
    Composition("mixtral_8x7b", "trn1", "pretrain"),
    Composition("bert", "trn1", "pretrain"),
    Composition("t5", "trn2", "pretrain"),
)
STOCK = (
    "megatron_gpt_config",
    "megatron_llama_config",
    "megatron_falcon_config",
    "megatron_gemma_config",
    "megatron_bert_config",
)


@dataclass
class Row:
    """What became of the mutations of one kind."""

    made: int = 0
    errors: int = 0
    listed: int = 0
    suggested: int = 0
    silent: list[str] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    unsuggested: list[str] = field(default_factory=list)


def ours() -> dict[str, dict[str, Any]]:
    """The ten, composed."""
    return {str(job): plain(read(Path("train"), job.overrides)) for job in CONFIGS}


def stock(checkout: Path) -> dict[str, dict[str, Any]]:
    """NeMo's, as they come, with what they ask a user for."""
    conf = checkout / "examples/nlp/language_modeling/conf"
    found = {}
    for name in STOCK:
        cfg = read(conf / f"{name}.yaml")
        OmegaConf.update(cfg, "model.data.data_impl", "mock")
        found[name] = plain(cfg)
    return found


def plain(cfg: Any) -> dict[str, Any]:
    """A config as dictionaries, interpolations kept."""
    made = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(made, dict)
    return {str(key): value for key, value in made.items()}


def judge(row: Row, mutation: Mutation, verdict: Verdict, clean: set[str], place: str) -> None:
    """Count a mutation. clean: the errors that the configuration has without it."""
    row.made += 1
    new = [str(error) for error in verdict.errors if str(error) not in clean]
    if new:
        row.errors += 1
    elif mutation.kind == "deleted" and any(d.key == mutation.key and d.common for d in verdict.report.defaults):
        row.listed += 1
    else:
        row.silent.append(f"{place}: {mutation.text}")
    if mutation.kind == "typo":
        unknown = [key for key in verdict.report.unknown if key.path == mutation.key]
        if unknown and unknown[0].suggestion.rpartition(".")[2] == mutation.meant:
            row.suggested += 1
        else:
            row.unsuggested.append(f"{mutation.text}: {unknown[0].suggestion if unknown else 'not seen'}")


def fuzz(configs: dict[str, dict[str, Any]], count: int, seed: int = SEED) -> dict[str, Row]:
    """`count` mutations, evenly over configurations and kinds."""
    draw, rows, known = random.Random(seed), {kind: Row() for kind in KINDS}, load_keys().knows
    before = {
        name: {str(e) for e in validate_config(OmegaConf.create(cfg), strict=True).errors}
        for name, cfg in configs.items()
    }
    names = list(configs)
    for number in range(count):
        name, kind = names[number % len(names)], KINDS[number // len(names) % len(KINDS)]
        mutation = None
        while mutation is None:
            config = copy.deepcopy(configs[name])
            mutation = mutate(config, kind, draw, known)
        try:
            verdict = validate_config(OmegaConf.create(config), strict=True)
        except Exception:
            rows[kind].made += 1
            last = traceback.format_exc().strip().splitlines()
            rows[kind].raised.append(f"{name}: {mutation.text}: {last[-1]} {last[-3].strip()}")
            continue
        judge(rows[kind], mutation, verdict, before[name], name)
    return rows


def table(rows: dict[str, Row]) -> str:
    """Markdown."""
    lines = [
        "| mutation | made | an error | its default is listed | accepted silently | exception | right key named |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        listed = str(row.listed) if kind == "deleted" else ""
        named = f"{100 * row.suggested / max(row.made, 1):.1f} %" if kind == "typo" else ""
        lines.append(
            f"| {kind} | {row.made} | {row.errors} | {listed} | {len(row.silent)} | {len(row.raised)} | {named} |"
        )
    return "\n".join(lines)


def good(rows: dict[str, Row]) -> bool:
    """Nothing silent, no exception, the right key for 95 % of the typos."""
    typo = rows["typo"]
    clean = not any(row.silent or row.raised for row in rows.values())
    return clean and typo.suggested >= 0.95 * typo.made


def markdown(rows: dict[str, Row], configs: dict[str, Any], count: int, seconds: float) -> str:
    """The file in docs/results."""
    from importlib.metadata import version

    listed = "\n".join(f"- `{name}`" for name in configs)
    missed = Counter(rows["typo"].unsuggested)
    rest = "".join(f"- {text}\n" for text in sorted(missed)) or "none\n"
    return f"""# Fuzz

`python tools/fuzz.py`, {time.strftime("%Y-%m-%d")}, seed {SEED}, {count:,} mutations in {seconds:.0f} s
with a load of {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores;
omegaconf {version("omegaconf")}, pydantic {version("pydantic")}. What `validate --strict` says of each is compared
with what it says of the configuration without the mistake.

{table(rows)}

A typo is two letters swapped, one left out, doubled or changed, at any depth of `trainer`, `exp_manager` and `model`;
the arguments of loggers (`*_kwargs`) are anybody's and not judged. A wrong type is a value of another YAML kind; out of
range is a number far below its least, or above its most; a contradiction is one of the pairs in
`tools/fuzz_lib/mutations.py`.
The mutations are made without the tables that judge them, but for one question: whether a misspelt name is a key too.

The configurations:

{listed}

Typos that got another key, or none:

{rest}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--checkout", type=Path)
    args = parser.parse_args()
    configs = stock(args.checkout) if args.checkout else ours()
    started = time.monotonic()
    rows = fuzz(configs, args.count)
    seconds = time.monotonic() - started
    print(table(rows))
    for kind, row in rows.items():
        for text in [*sorted(set(row.silent))[:60], *sorted(set(row.raised))[:20]]:
            print(f"{kind}: {text}")
    print(f"{args.count} mutations in {seconds:.0f} s; {'good' if good(rows) else 'NOT good'}")
    if len(sys.argv) == 1:
        RESULT.write_text(markdown(rows, configs, args.count, seconds), encoding="utf-8")
    return 0 if good(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
