"""The sub-commands of `nxdt-nemo`.

Room cli/. Parses and prints only. Imports typer; the sub-commands import what they need when they run, so
that --help loads neither torch nor a configuration library. Proof: tests/cli/test_help.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nxdt_nemo import __version__
from nxdt_nemo.cli import ckpt, configs, patches
from nxdt_nemo.cli.audit import audit
from nxdt_nemo.cli.compile import compile_graphs
from nxdt_nemo.cli.doctor import doctor
from nxdt_nemo.cli.launch import launch
from nxdt_nemo.cli.migrate import Dialect, ModelConfig, TrainSetup, job_arguments, migrate
from nxdt_nemo.cli.run import Job
from nxdt_nemo.cli.validate import validate
from nxdt_nemo.errors import UserError

__all__ = ["app", "parsed"]

app = typer.Typer(
    name="nxdt-nemo",
    help="Run unedited NVIDIA NeMo and Megatron training scripts on AWS Trainium.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(patches.app, name="patches")
app.add_typer(configs.app, name="configs")
app.command("doctor")(doctor)
app.command("migrate")(migrate)
app.command("audit")(audit)
app.command("validate")(validate)
app.command("launch")(launch)
app.command("compile")(compile_graphs)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nxdt-nemo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# Options end at the script's name: whatever follows is the script's, `-h` and `--config-path=conf` included.
@app.command("run", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
def _run(
    context: typer.Context,
    script: Annotated[
        str | None, typer.Argument(metavar="SCRIPT", help="The script, or the module after -m.", show_default=False)
    ] = None,
    args: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="Passed on as they are.", show_default=False)
    ] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module's name.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="Pretrain from this YAML file; overrides in SCRIPT's place.")
    ] = None,
    dialect: Dialect = "auto",
    train_setup: TrainSetup = None,
    model_config: ModelConfig = None,
) -> None:
    """Run SCRIPT as python would, with the backend active; or --config FILE, of NeMo, NxD Training or NNM."""
    words = [*([script] if script is not None else []), *(args or ())]
    if config is not None:
        if module:
            raise UserError("there is no SCRIPT with --config", place="-m")
        context.obj.append(Job(*job_arguments(config, words, dialect, train_setup, model_config)))
    elif script is None:
        raise UserError("nothing to run", place="nxdt-nemo run", fix="name a script, or --config FILE")
    else:
        context.obj.append(Job(script, tuple(args or ()), module))


# main.py goes there by itself; here it is for --help, which lists it.
@app.command("ckpt", add_help_option=False, context_settings={"ignore_unknown_options": True})
def _ckpt(args: Annotated[list[str] | None, typer.Argument(metavar="COMMAND [ARGS]")] = None) -> None:
    """Checkpoints: inspect, convert, merge adapters."""
    ckpt.main(args or ())


def parsed(arguments: Sequence[str]) -> Job:
    """What `run` is to start. Other commands are done when they end, with SystemExit; UserError passes."""
    jobs: list[Job] = []
    try:
        typer.main.get_command(app).main(args=list(arguments), prog_name="nxdt-nemo", obj=jobs)
    except SystemExit as finished:
        if finished.code or not jobs:
            raise
    return jobs[0]
