"""Configurations of each dialect, migrated in memory and shrunk by overrides only: 3 steps on the cpu lane.

    NXDT_NEMO_CHECKOUT=... NXDT_CHECKOUT=... NNM_CHECKOUT=... python tools/migrate_train.py
                                                # what has not trained yet; writes docs/results/migrate_train.md
    python tools/migrate_train.py --fresh       # all, 15 minutes on an idle machine
    python tools/migrate_train.py mixtral nnm-  # those with one of these words in dialect-name, again

The checkouts are those of NVIDIA/NeMo (v2.4.0), aws-neuron/neuronx-distributed-training and
aws-neuron/neuronx-nemo-megatron. A run may be cut short: build/migrate_train.json has what each configuration came to,
and the next run goes on from there. Exit code 1 when a configuration does not train.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

from parity_lib.sheet import heading

from nxdt_nemo.testing.migrated import CASES, CHECKOUTS, Case, train
from nxdt_nemo.testing.script_run import Run, write_corpus

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "migrate_train.md"
KEPT = ROOT / "build" / "migrate_train.json"
PARALLEL = {"TP": "tensor_model", "PP": "pipeline_model", "CP": "context"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="configurations to train again")
    parser.add_argument("--fresh", action="store_true", help="forget what was trained before")
    args = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() and not args.fresh else {}
    again = [case for case in CASES if any(word in name(case) for word in args.words)]
    todo = again if args.words else [case for case in CASES if not kept.get(name(case), "").endswith("green |")]
    if missing := sorted({CHECKOUTS[c.dialect][0] for c in todo} - {k for k, v in os.environ.items() if v}):
        raise SystemExit(f"{', '.join(missing)}: name the checkouts, see --help")
    with tempfile.TemporaryDirectory() as place:
        corpus = write_corpus(Path(place) / "corpus")
        for case in todo:
            found = train(case, corpus, Path(place) / name(case))
            kept[name(case)] = row(case, found)
            print(kept[name(case)], flush=True)
            if not trained(found):
                print(found.output[-2000:], flush=True)
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    lines = [kept[name(case)] for case in CASES if name(case) in kept]
    missing = [name(case) for case in CASES if name(case) not in kept]
    RESULT.write_text(markdown(lines, missing), encoding="utf-8")
    return 0 if len(lines) == len(CASES) and all(line.endswith("green |") for line in lines) else 1


def name(case: Case) -> str:
    """A case as a word."""
    return f"{case.dialect}-{case.name}"


def trained(found: Run) -> bool:
    """Three finite losses and an ending without an error."""
    losses = found.curve()
    return found.code == 0 and sorted(losses) == [0, 1, 2] and all(math.isfinite(loss) for loss in losses.values())


def row(case: Case, found: Run) -> str:
    """A line of the table."""
    losses = ", ".join(f"{loss:.4f}" for _, loss in sorted(found.curve().items()))
    more = " ".join((*(o for o in case.options if o.startswith("--")), *case.overrides))
    verdict = "green" if trained(found) else "red"
    return f"| {case.dialect} | {case.name} | {layout(case)} | {more} | {losses} | {verdict} |"


def layout(case: Case) -> str:
    """Its ranks, and what its overrides divide over them."""
    given = dict(override.split("=", 1) for override in case.overrides)
    sizes = {key: given.get(f"model.{word}_parallel_size") for key, word in PARALLEL.items()}
    parts = [f"{key} {size}" for key, size in sizes.items() if size]
    parts += ["SP"] if given.get("model.sequence_parallel") == "True" else []
    return ", ".join([f"{case.ranks} rank{'s' if case.ranks > 1 else ''}", *parts])


def markdown(lines: list[str], missing: list[str]) -> str:
    """The file in docs/results."""
    rest = f"\nNot in this table yet: {', '.join(missing)}.\n" if missing else ""
    return f"""# Migrated configurations train

{heading("python tools/migrate_train.py")}
`nxdt-nemo run --config FILE OVERRIDES` migrates the file in memory and trains it: NeMo's MegatronGPTModel on text or
rows, its MegatronGPTSFTModel on pairs, `nxdt_nemo/nemo/examples/megatron_alignment.py` on preferences. The overrides
shrink layers, sizes, sequence, batch and layout, and name data, with a tokenizer where it is not token ids:
`overrides()` in `nxdt_nemo/testing/migrated.py`. What a file says of precision, optimizer, norm, activation,
positions, experts and recomputation stays. Three steps say that it runs, and nothing of how well it learns. A row is
of the last run of its configuration: the tool goes on where it was cut short.

| dialect | configuration | layout | beyond the common overrides | losses of the 3 steps | verdict |
|---|---|---|---|---|---|
{chr(10).join(lines)}
{rest}"""


if __name__ == "__main__":
    sys.exit(main())
