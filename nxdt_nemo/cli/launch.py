"""`nxdt-nemo launch`: the script or manifest that starts a configuration on several nodes.

Room cli/. Parses and prints; config/launch writes. Proof: tests/cli/test_doctor_target.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nxdt_nemo import console
from nxdt_nemo.cli.output import into, write
from nxdt_nemo.errors import UserError

if TYPE_CHECKING:
    from nxdt_nemo.config.launch import Launch

__all__ = ["launch"]


def launch(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A NeMo YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OVERRIDE]...", help="Hydra's: key=value.", show_default=False),
    ] = None,
    on: Annotated[
        Literal["torchrun", "slurm", "eks", "parallelcluster"], typer.Option("--on", help="Who starts the nodes.")
    ] = "torchrun",
    script: Annotated[
        str | None,
        typer.Option(help="Your script, as the nodes see it. Default: this package's own.", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Instance type, or cpu for a rehearsal. Default: neuron.instance.", show_default=False),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Default: trainer.num_nodes.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write into. Default: print.", show_default=False)
    ] = None,
    image: Annotated[str, typer.Option(help="Container image (eks).", show_default=False)] = "",
    claim: Annotated[
        str, typer.Option(help="PersistentVolumeClaim to mount at /shared (eks).", show_default=False)
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Write over files of FOLDER.")] = False,
) -> None:
    """Write what starts CONFIG on nodes of Trainium: a script for torchrun or SLURM, manifests for EKS, a cluster.

    Each variable that Neuron needs is in it with its reason and source. The configuration is checked before.
    """
    from nxdt_nemo.config.launch import files, plan
    from nxdt_nemo.config.validate import find, read

    given = tuple(overrides or ())
    options = {"script": script, "target": target, "nodes": nodes, "image": image, "claim": claim}
    made = plan(
        read(config, given),
        launcher=on,
        config=find(config),
        overrides=given,
        command=_command(on, config, given, options),
        script=script,
        target=target,
        nodes=nodes,
        image=image,
        claim=claim,
    )
    found = files(made)
    for note in made.notes:
        console.notice(f"note: {note}")
    if output is None:
        _print(made, found)
    else:
        written = {into(output, "-o") / name: text for name, text in found.items()}
        write(written, force=force)
        typer.echo("\n".join(map(str, written)))


def _command(on: str, config: Path, overrides: tuple[str, ...], options: Mapping[str, object]) -> str:
    """The command line once more, for the first lines of what it writes."""
    words = ["nxdt-nemo", "launch", "--on", on, str(config), *overrides]
    words += [word for name, value in options.items() if value for word in (f"--{name}", str(value))]
    return shlex.join(words)


def _print(made: Launch, found: dict[str, str]) -> None:
    if len(found) > 1:
        raise UserError(f"writes {' and '.join(found)}", place=f"--on {made.launcher}", fix="name a folder with -o")
    for text in found.values():
        typer.echo(text, nl=False)
