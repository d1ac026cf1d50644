"""NeMo's own scripts of examples/nlp/language_modeling, unedited, on the cpu lane: each runs, or is refused by name.

    python tools/scripts.py CHECKOUT                    # what has not run yet; writes docs/results/scripts.md
    python tools/scripts.py CHECKOUT --rows t5 merge    # rows with one of these words in their name, again
    python tools/scripts.py CHECKOUT --fresh            # all, 20 minutes on an idle machine

CHECKOUT is that of NVIDIA/NeMo at v2.4.0. The commands are shrunk by overrides; verdicts come from what a run left and
printed. build/scripts has the folder of each row, and what it came to: a run may be cut short, and the next one goes
on from there. Exit code 1 when a row is not as the table says.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from parity_lib.sheet import heading
from scripts_lib.inputs import prepare
from scripts_lib.rows import FOLDER, ROWS, Row
from scripts_lib.shown import Done, Unexpected

from nxdt_nemo.testing.script_run import OURS, run

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "scripts.md"
BUILD = ROOT / "build" / "scripts"
ENVIRONMENT = {"NXDT_NEMO_RUNTIME": "cpu", "HF_HUB_OFFLINE": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--rows", nargs="+", default=[], help="words of the rows to run again")
    parser.add_argument("--fresh", action="store_true", help="forget what was run before")
    args = parser.parse_args()
    if missing := [row.script for row in ROWS if not row.path(args.checkout).is_file()]:
        raise SystemExit(f"{args.checkout}: no checkout of NeMo v2.4.0: {missing[0]}.py is not in it")
    if args.fresh:
        shutil.rmtree(BUILD, ignore_errors=True)
    data, file = prepare(BUILD / "data"), BUILD / "done.json"
    found: dict[str, list[str]] = json.loads(file.read_text()) if file.is_file() else {}
    for row in chosen(args.rows, found):
        found[row.name] = verdict(row, args.checkout, data, BUILD)
        print(": ".join((row.name, *found[row.name])), flush=True)
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        RESULT.write_text(page(found, args.checkout), encoding="utf-8")
    return 0 if all(found.get(row.name, [""])[0] == "green" for row in ROWS) else 1


def chosen(words: list[str], found: dict[str, list[str]]) -> list[Row]:
    """Rows with one of the words in their name, or all that are not green; after those whose files they read."""
    if words:
        wanted = {row.name for row in ROWS if any(word in row.name for word in words)}
    else:
        wanted = {row.name for row in ROWS if found.get(row.name, [""])[0] != "green"}
    order: list[Row] = []

    def add(row: Row) -> None:
        for name in row.needs:
            if found.get(name, [""])[0] != "green" or name in wanted:
                add(next(other for other in ROWS if other.name == name))
        if row not in order:
            order.append(row)

    for row in ROWS:
        if row.name in wanted:
            add(row)
    return order


def verdict(row: Row, checkout: Path, data: Path, rows: Path) -> list[str]:
    """["green", what came out], or ["RED", why]; `rows` has a folder for each row."""
    folder = rows / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        done = run(
            row.path(checkout).resolve(),
            row.filled(data, folder, rows),
            folder,
            seconds=600,
            command=launcher(row),
            environment=ENVIRONMENT,
            cwd=folder,
        )
    except subprocess.TimeoutExpired as error:
        return ["RED", f"not at its end after {error.timeout:.0f} seconds"]
    (folder / "said.txt").write_text(done.output, encoding="utf-8")
    try:
        came = row.shows(Done(done, folder, data, rows))
    except (Unexpected, OSError, KeyError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        return ["RED", f"exit code {done.code}; {' '.join(str(error).split())[:300]}"]
    return ["green", came] if done.code == 0 or came.startswith("refused") else ["RED", f"exit code {done.code}"]


def launcher(row: Row) -> tuple[str, ...]:
    """What starts the script."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={row.ranks}")
    return (*torchrun, *OURS) if row.ranks else OURS


def page(found: dict[str, list[str]], checkout: Path) -> str:
    """docs/results/scripts.md."""
    lines = "\n".join(line(row, found.get(row.name, ["not run", ""]), checkout) for row in ROWS)
    own = [row for row in ROWS if not row.script.startswith("scripts/")]
    refused = {row.script for row in own if not row.words}
    count = len({row.script for row in own})
    return f"""# NeMo's own scripts

{heading("python tools/scripts.py CHECKOUT")}
All {count} scripts of `{FOLDER}` of NeMo v2.4.0, unedited, and two of
`scripts/nlp_language_modeling`: {count - len(refused)} of the {count} run, {len(refused)} are refused
in one line, before anything is imported. What came out is read from what a run left and printed: losses that fall,
tokens of transformers' `generate`, tensors. A T5 that was tuned on four pairs gives their answers. The work of
`megatron_change_num_partitions`, which stands for many ranks in one process, is done by `nxdt-nemo ckpt convert`.
Commands are below; all YAMLs of the folder, those that no script names among them: [migrate.md](migrate.md).

| script | its YAML | layout | what came out | verdict |
|---|---|---|---|---|
{lines}

## Commands

`DATA` is a folder of small inputs (`tools/scripts_lib/inputs.py`), `ROWS` that in which each row has a folder, `RUN`
the row's own.

{commands()}
"""


def line(row: Row, found: list[str], checkout: Path) -> str:
    """A line of the table."""
    came = found[1].replace("|", "\\|")
    return f"| {row.script} | {yaml(row, checkout)} | {row.layout if row.words else ''} | {came} | {found[0]} |"


def yaml(row: Row, checkout: Path) -> str:
    """The configuration that the row names, or the script; "" for one that has none."""
    said = [word.partition("=")[2] for word in row.words if word.startswith("--config-name=")]
    return (said or re.findall(r'config_name="(\w+)"', row.path(checkout).read_text(encoding="utf-8")) or [""])[0]


def commands() -> str:
    """What each row that is not refused was started with."""
    blocks = []
    for row in ROWS:
        if row.words:
            text = shlex.join(row.filled(Path("DATA"), Path("RUN"), Path("ROWS")))
            start = f"torchrun --nproc-per-node={row.ranks} -m nxdt_nemo run" if row.ranks else "nxdt-nemo run"
            blocks.append(f"**{row.script}**, {row.layout}\n\n```\n{start} {row.script}.py {text}\n```")
    return "\n\n".join(blocks)


if __name__ == "__main__":
    sys.exit(main())
