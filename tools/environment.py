"""docs/environment.md from the table that runs and launchers read, configs/environment.toml.

python tools/environment.py           print it
python tools/environment.py --write   into docs/environment.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from nxdt_nemo.config.environment import Variable, refused, variables

FILE = Path(__file__).resolve().parent.parent / "docs" / "environment.md"
HEAD = """\
# Environment variables of a run on Trainium

Written by `tools/environment.py` from `configs/environment.toml`; edit that. A key of `neuron:` comes before what the
user has exported, and that before the table. `NEURON_CC_FLAGS` is appended to: options that somebody has given stay.
`nxdt-nemo doctor --target trn2.48xlarge` prints the values of one instance.

When: *process*, before torch_xla is imported, by `nxdt-nemo run`, by a plain start of a script and by launch scripts;
*launch*, launch scripts only; *nodes*, launch scripts for several nodes; *compile*, `nxdt-nemo compile`.

A plain start is `NXDT_NEMO=1 NXDT_NEMO_RUNTIME=xla python script.py`, under torchrun too, or NeMo 2.0's `nemo ...`; a
plain `python -m` or `-c` sets nothing. A script without a YAML file (NeMo 2.0, megatron-core's own loop) gets what the
table gives without a configuration, on the xla and the neuron lane. Its precision is not known before it runs
(`unknown` below): `--auto-cast none` suits float32 and bf16, since nothing is cast but what the script casts;
`--enable-mixed-precision-accumulation` and `NEURON_RT_STOCHASTIC_ROUNDING_EN` stay as exported, and a job with bf16
weights without float32 main ones has to export the second. Its LNC is that of the ranks which torchrun places on the
host, or `NEURON_LOGICAL_NC_CONFIG` as exported; without either, compiler and runtime keep the chip's own.

| variable | value | when | key | NxD Training's | reason |
|---|---|---|---|---|---|
"""
FOOT = """
## Never set

| variable | reason | instead |
|---|---|---|
"""


def value(row: Variable) -> Iterator[str]:
    """Who gives which value."""
    if row.value is not None:
        yield f"`{row.value}`"
    for values in (row.precision, row.chip, row.instance):
        for key, one in values.items():
            yield f"{key}: `{one}`"


def lines() -> Iterator[str]:
    """The page."""
    yield HEAD.rstrip("\n")
    for row in variables():
        key = f"`neuron.{row.key}`" if row.key else ""
        nxdt = f"`{row.nxdt}`" if row.nxdt else ""
        said = "; ".join(value(row)) or "the key's"
        source = row.source if "://" in row.source else f"../{row.source}"
        yield f"| [`{row.name}`]({source}) | {said} | {row.when} | {key} | {nxdt} | {row.reason} |"
    yield FOOT.rstrip("\n")
    for wrong in refused():
        yield f"| [`{wrong.name}={wrong.when}`]({wrong.source}) | {wrong.reason} | {wrong.instead} |"


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    text = "\n".join(lines()) + "\n"
    if parser.parse_args().write:
        FILE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
