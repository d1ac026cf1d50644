"""`nxdt-nemo configs`: the configurations that come with the package.

Room cli/. Imports neither torch nor NeMo; hydra where a configuration is shown. Proof: tests/cli/test_validate.py.
"""

from __future__ import annotations

from typing import Annotated

import typer

from nxdt_nemo.errors import UserError

__all__ = ["app"]

app = typer.Typer(help="Our configurations: list, show, path.", no_args_is_help=True, rich_markup_mode=None)

_Chosen = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[model=...] [target=...] [workflow=...]", help="Further overrides too.", show_default=False
    ),
]


@app.command("list")
def list_() -> None:
    """The models, targets and workflows, which go together."""
    from nxdt_nemo.config.compositions import GROUPS, PREFERENCES, Composition, about, compositions, options

    for group in GROUPS:
        typer.echo(f"{group}")
        for name in options(group):
            note = " (by nxdt-nemo run --config)" if name in PREFERENCES else ""
            typer.echo(f"  {name:16} {about(group, name)}{note}")
    models = [name for name in options("model") if not Composition(name, "trn1", "sft").fits]
    typer.echo(
        f"{sum(1 for _ in compositions())} go together: all, but {' and '.join(models)} are for pretraining only"
    )


@app.command()
def show(chosen: _Chosen = None) -> None:
    """One configuration, whole, as one file that needs nothing beside it."""
    from omegaconf import OmegaConf

    from nxdt_nemo._resources import folder
    from nxdt_nemo.config.compositions import PRIMARY
    from nxdt_nemo.config.validate import read

    given = chosen or []
    _check(given)
    cfg = read(folder("configs") / f"{PRIMARY}.yaml", given)
    typer.echo(f"# nxdt-nemo configs show {' '.join(given)}".rstrip())
    typer.echo(OmegaConf.to_yaml(cfg), nl=False)


@app.command()
def path() -> None:
    """The folder, for hydra's --config-path."""
    from nxdt_nemo._resources import folder

    typer.echo(str(folder("configs")))


def _check(given: list[str]) -> None:
    """The options are there, and go together."""
    from difflib import get_close_matches

    from nxdt_nemo.config.compositions import GROUPS, Composition, options
    from nxdt_nemo.config.report import or_list

    chosen = dict(entry.split("=", 1) for entry in given if "=" in entry)
    for group in GROUPS:
        name, known = chosen.get(group), options(group)
        if name is not None and name not in known:
            near = get_close_matches(name, known, n=1)
            raise UserError(
                "is not there",
                place=f"{group}={name}",
                fix=f"did you mean {near[0]}?" if near else f"use {or_list(known)}",
            )
    found = Composition(
        chosen.get("model", "llama3_8b"), chosen.get("target", "trn1"), chosen.get("workflow", "pretrain")
    )
    if not found.fits:
        raise UserError(
            "is for decoders", place=f"workflow={found.workflow}", fix=f"{found.model} has workflow=pretrain"
        )
