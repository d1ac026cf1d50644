"""`nxdt-nemo migrate`: a configuration or a launch script of NeMo, NNM or NxD Training as one of ours.

Room cli/. Parses, reads, writes and prints; config/migrate decides. Also what `nxdt-nemo run --config` starts.
Proof: tests/cli/test_migrate.py.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nxdt_nemo import console
from nxdt_nemo.cli.output import write
from nxdt_nemo.errors import UserError

if TYPE_CHECKING:
    from nxdt_nemo.config.migrate import MigrationReport

__all__ = ["Dialect", "ModelConfig", "TrainSetup", "job_arguments", "migrate"]

Dialect = Annotated[str, typer.Option("--from", help="auto, nemo, nxdt or nnm.")]
TrainSetup = Annotated[
    Path | None, typer.Option("--train-setup", help="NNM's train_setup.sh, which says the precision.")
]
ModelConfig = Annotated[
    Path | None, typer.Option("--model-config", help="The Hugging Face config.json that NxD Training's file names.")
]
SCRIPTS = (".sh", ".slurm", ".sbatch", ".bash")


def migrate(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A YAML file, or a launch script.", show_default=False)],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write here instead of stdout.")] = None,
    dialect: Dialect = "auto",
    target: Annotated[str, typer.Option(help="trn1.32xlarge, trn2.48xlarge or cpu.")] = "",
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of instances.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if there is something to do.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON, on stdout.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The report as Markdown, on stdout.")] = False,
    train_setup: TrainSetup = None,
    model_config: ModelConfig = None,
    force: Annotated[bool, typer.Option("--force", help="Write over OUT.")] = False,
) -> None:
    """Write IN as NeMo 2.4 YAML that this backend runs, and report on every key; exit code 1 if there is an error.

    The YAML goes to OUT, or to stdout with the report on stderr. With --json or --markdown the report goes to stdout
    and the YAML to OUT only.
    """
    form: Literal["json", "markdown", "table"] = "json" if as_json else "markdown" if markdown else "table"
    text = _read(source)
    if source.suffix in SCRIPTS or text.startswith("#!"):
        from nxdt_nemo.config.migrate.launch import translate

        launch = translate(text, place=source.name)
        result, shown = launch.text, launch.show(form)
        failed = False
    else:
        from nxdt_nemo.config import migrate as room

        options = room.Options(
            dialect=dialect,
            target=target,
            nodes=nodes,
            training_precision=_precision(train_setup),
            model_config=model_config,
        )
        migrated = room.migrate(text, options, place=source.name)
        report = migrated.report
        result, failed = migrated.text, bool(report.errors)
        shown = {
            "json": lambda: json.dumps(report.as_json(), indent=2, default=str),
            "markdown": report.as_markdown,
            "table": report.render,
        }[form]()
    if check:
        typer.echo(shown)
        if failed or result != text:
            raise typer.Exit(1)
        return
    if output is not None:
        write({output: result}, force=force)
    elif form == "table":
        typer.echo(result, nl=not result.endswith("\n"))
    typer.echo(shown, err=output is None and form == "table")
    if failed:
        raise typer.Exit(1)


def job_arguments(
    config: Path, words: Sequence[str], dialect: str, train_setup: Path | None, model_config: Path | None
) -> tuple[str, tuple[str, ...]]:
    """The script that trains a configuration of any dialect, and its arguments.

    The migrated file lies in a temporary folder for as long as this process lives: ranks that Lightning starts read
    it too. Overrides may be in the file's own keys or in NeMo's.
    """
    from omegaconf import OmegaConf

    from nxdt_nemo.config import migrate as room
    from nxdt_nemo.config.migrate.engine import parse_overrides
    from nxdt_nemo.config.validate import find, has_defaults, hydra_options, read

    config = find(config)
    hydras = [word for word in words if word.startswith(("hydra", "~", "-")) or _is_group(config, word)]
    options = room.Options(
        dialect=dialect,
        training_precision=_precision(train_setup),
        model_config=model_config,
        overrides=parse_overrides([word for word in words if word not in hydras]),
        findings=False,  # the run's own checks come after hydra
    )
    migrated = room.migrate(_read(config), options, place=config.name)
    _say(migrated.report)
    folder = Path(tempfile.mkdtemp(prefix="nxdt_nemo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    written = folder / f"{config.stem}.yaml"
    written.write_text(migrated.text, encoding="utf-8")
    arguments = hydra_options(written)
    groups: list[str] = []
    beside = config.resolve().parent if has_defaults(migrated.text) else None
    if beside is not None:
        arguments.append(f"--config-dir={beside}")
        groups = [word for word in words if _is_group(config, word)]
    arguments += [f"++{one.key}={one.text}" for one in migrated.rest]
    arguments += hydras
    composed = read(written, groups, groups=beside)
    tunes = OmegaConf.select(composed, "model.data.train_ds") is not None
    said = [one.key for one in migrated.rest]
    prefers = any(
        OmegaConf.select(composed, key) is not None or any(f"{word}.".startswith(f"{key}.") for word in said)
        for key in ("neuron.alignment.dpo", "neuron.alignment.orpo")
    )
    workflow = "alignment" if prefers else "finetuning" if tunes else "pretraining"
    import nxdt_nemo

    scripts = Path(str(nxdt_nemo.__file__)).parent / "nemo" / "examples"
    return str(scripts / f"megatron_{workflow}.py"), tuple(arguments)


def _is_group(config: Path, word: str) -> bool:
    """True if an override chooses a file of a hydra group: there is a folder of its name beside the configuration."""
    name = word.partition("=")[0].lstrip("+")
    return bool(name) and (config.resolve().parent / name).is_dir()


def _say(report: MigrationReport) -> None:
    """One line of what was done, one for each thing that a person should know; an error ends the run."""
    from nxdt_nemo.config.report import shown

    if report.dialect == "nemo" and not report.changed:
        return
    console.notice(report.summary())
    for entry in report.entries:
        where = entry.key or entry.to
        if entry.level == "error":
            raise UserError(f"{where}={shown(entry.old)}: {entry.why}", place=report.place)
        if entry.level:
            console.warn(f"{where}={shown(entry.new if entry.to else entry.old)}: {entry.why}")


def _precision(file: Path | None) -> str:
    if file is None:
        return ""
    from nxdt_nemo.config.migrate.train_setup import training_precision

    return training_precision(file)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise UserError("is a folder", place=str(file), fix="name a YAML file or a launch script") from None
    except FileNotFoundError:
        raise UserError("there is no such file", place=str(file)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", place=str(file)) from None
