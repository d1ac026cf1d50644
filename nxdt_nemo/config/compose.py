"""What hydra will compose for an unedited script, found before that script runs and without importing NeMo.

Room config/ (leaf). Follows nemo/core/config/hydra_runner.py (NeMo 2.4.1), whose resolvers have stand-ins here for as
long as a config is composed. May import omegaconf, hydra (when it composes) and nxdt_nemo.errors.
Proof: tests/config/test_compose.py.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nxdt_nemo.config.keys import load, names_in
from nxdt_nemo.config.report import Report, Unknown, or_list
from nxdt_nemo.config.rules import check
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["Entry", "compose_entry", "compose_for", "precheck", "ranks_of_a_node", "settle", "world_size"]

# NeMo's own resolvers by name: gpu_name asks NVIDIA's driver, which answers None without a GPU.
RESOLVERS: dict[str, Callable[..., Any]] = {
    "multiply": lambda x, y: x * y,
    "sum": lambda x, y: x + y,
    "gpu_name": lambda: None,
}
# Options of hydra that print something instead of running the script, or run it several times.
ELSEWHERE = ("help", "hydra_help", "cfg", "info", "multirun", "shell_completion", "experimental_rerun")
# The script that trains by neuron.alignment.
PREFERENCES = "megatron_alignment.py"
OPTIONS = ("config_path", "config_name", "version_base")
# multistorageclient's, for msc:// addresses: it takes as long as all else, and logs a traceback for a folder.
UNUSED_PLUGIN = "hydra_plugins.hydra_msc_plugin"


@dataclass(frozen=True)
class Entry:
    """What a script's decorator and its command line ask hydra for.

    file  what errors name, where hydra reads a copy of it
    """

    folder: Path
    name: str
    overrides: tuple[str, ...]
    extra_folder: Path | None = None
    version_base: str | None = "1.1"
    file: str = ""

    @property
    def place(self) -> str:
        """The YAML file as an error names it."""
        return self.file or (self.name if self.name.endswith((".yaml", ".yml")) else f"{self.name}.yaml")


def compose_for(script: Path | None, argv: list[str]) -> DictConfig | None:
    """The config that hydra will compose for a script, or None when it will not or when that cannot be told.

    argv   the script's arguments, without its name
    None   there is no script or no hydra_runner or hydra.main in it, its decorator is not made of literals, it
           registers a schema, hydra is not installed, or an option such as --help, --cfg or --multirun is given

    Interpolations that need NeMo's resolvers are values in the result. No state of hydra or omegaconf is left behind.
    Raises ConfigError for a missing folder or file, an unknown override or a YAML that cannot be read.
    """
    entry = _entry(script, argv)
    return None if entry is None else compose_entry(entry)


def precheck(
    script: Path | None,
    argv: list[str],
    environ: Mapping[str, str] | None = None,
    *,
    also_errors: Callable[[DictConfig, int | None, str], Iterable[ConfigError]] | None = None,
) -> Report | None:
    """check() on the config that a script will get, before it runs; None when there is no such config.

    also_errors(cfg, ranks, place) is asked when the rules found none: what is computed above this room.
    The keys that the script itself names are not unknown. Raises ConfigError as compose_for does; all other findings
    are in the report, and nothing is changed.
    """
    environ = os.environ if environ is None else environ
    entry = _entry(script, argv)
    if entry is None or script is None:
        return None
    cfg = compose_entry(entry)
    ranks = world_size(cfg, environ)
    report = check(cfg, world_size=ranks, place=entry.place, also=names_in(script))
    report.errors += _launcher(View(cfg), environ, entry.place)
    report.errors += _script(View(cfg), script, entry.place)
    if also_errors is not None and not report.errors:
        report.errors += also_errors(cfg, ranks, entry.place)
    return report


def _script(view: View, script: Path, place: str) -> Iterator[ConfigError]:
    """NeMo's scripts would train something else, and say nothing."""
    for name in view.preferences if script.name != PREFERENCES else ():
        reason = f"neuron.alignment.{name} is nothing that {script.name} trains"
        yield ConfigError(reason, place=place, fix="start it by nxdt-nemo run --config FILE")


def _launcher(view: View, environ: Mapping[str, str], place: str) -> Iterator[ConfigError]:
    """torchrun's ranks are those that the config asks for; Lightning refuses anything else, with a traceback a rank."""
    started, asked = environ.get("WORLD_SIZE", ""), _asked(view)
    if "TORCHELASTIC_RUN_ID" not in environ or not started.isdigit() or view.get("trainer.accelerator") == "cpu":
        return
    if asked is not None and asked != int(started):
        yield ConfigError(
            f"trainer.devices x trainer.num_nodes = {asked}, but torchrun started {started} ranks",
            place=place,
            fix=f"use trainer.devices={environ.get('LOCAL_WORLD_SIZE', started)}",
        )


def world_size(cfg: DictConfig, environ: Mapping[str, str], *, view: View | None = None) -> int | None:
    """Ranks of the run: what a launcher announced, else trainer.devices x trainer.num_nodes; None if neither says.

    view    of cfg, where there is one already
    """
    told = environ.get("WORLD_SIZE", "")
    # Lightning and torchrun count ranks there; some schedulers count nodes, and set no LOCAL_RANK.
    if told.isdigit() and "LOCAL_RANK" in environ:
        return int(told)
    asked, tasks = _asked(view or View(cfg)), environ.get("SLURM_NTASKS", told)
    return asked if asked is not None or not tasks.isdigit() else int(tasks)


def ranks_of_a_node(view: View) -> int | None:
    """How many trainer.devices asks for, None when it is absent, "auto" or -1."""
    devices = view.get("trainer.devices")
    count = len(devices) if isinstance(devices, list) else view.number("trainer.devices")
    return count if count is not None and count > 0 else None


def _asked(view: View) -> int | None:
    """trainer.devices x trainer.num_nodes, None when devices does not say how many."""
    count = ranks_of_a_node(view)
    return None if count is None else count * view.size("trainer.num_nodes")


# The script and its command line


def _entry(script: Path | None, argv: list[str]) -> Entry | None:
    """The decorator's arguments with those of the command line over them."""
    if script is None or not script.is_file() or find_spec("hydra") is None:
        return None
    decorator = _decorator(_tree(script))
    options = None if decorator is None else _literals(decorator)
    given = None if options is None else _parse(argv)
    if options is None or given is None:
        return None
    path = given.config_path or options.get("config_path", ".")
    name = given.config_name or options.get("config_name")
    if not isinstance(path, str) or not isinstance(name, str) or path.startswith("pkg://"):
        return None
    return Entry(
        folder=_folder(script, path),
        name=name,
        overrides=tuple(given.overrides),
        extra_folder=_extra_folder(given.config_dir),
        version_base=options.get("version_base", "1.1"),
    )


def _tree(script: Path) -> ast.Module | None:
    """The syntax tree; None if the script does not parse, which Python will say better when it runs it."""
    try:
        return ast.parse(script.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _decorator(tree: ast.Module | None) -> ast.Call | None:
    """The call in `@hydra_runner(...)` or `@hydra.main(...)`, however it was imported; None if there is none."""
    mains = {"hydra_runner", "hydra.main"}
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.ImportFrom):
            wanted = "main" if node.module == "hydra" else "hydra_runner"
            mains |= {alias.asname or alias.name for alias in node.names if alias.name == wanted}
    for node in ast.walk(tree) if tree else ():
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(call, ast.Call):
                name = ast.unparse(call.func)
                if name in mains or name.endswith((".hydra_runner", "hydra.main")):
                    return call
    return None


def _literals(call: ast.Call) -> dict[str, Any] | None:
    """The decorator's arguments by name; None when one is not a literal or a schema is registered."""
    named = {OPTIONS[at]: value for at, value in enumerate(call.args[: len(OPTIONS)])}
    named |= {word.arg or "**": word.value for word in call.keywords}
    if not set(named) <= set(OPTIONS):
        return None
    try:
        return {name: ast.literal_eval(value) for name, value in named.items()}
    except ValueError:
        return None


def _parse(argv: list[str]) -> Any:
    """The command line as hydra parses it; None when hydra will not run the script just once with it."""
    from hydra._internal.utils import get_args_parser

    silent = io.StringIO()
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            given = get_args_parser().parse_args(argv)
    except SystemExit:
        return None
    return None if any(getattr(given, name, None) for name in ELSEWHERE) else given


def _folder(script: Path, path: str) -> Path:
    """The config folder, which is relative to the script's folder."""
    home = Path(os.path.realpath(script)).parent
    folder = Path(os.path.normpath(home / path))
    if folder.is_dir():
        return folder
    option = f"--config-path={path}"
    if path.endswith((".yaml", ".yml")):
        parent, name = os.path.split(path)
        fix = f"use --config-path={parent or '.'} --config-name={name}"
        raise ConfigError(f"{option} is a file, not a folder", place=script.name, fix=fix)
    fix = f"--config-path={Path(path).resolve()} is there" if Path(path).is_dir() else "it is relative to the script"
    raise ConfigError(f"{option}: there is no folder {folder}", place=script.name, fix=fix)


def _extra_folder(path: str | None) -> Path | None:
    """The folder of --config-dir, which is relative to the working directory."""
    if path is None:
        return None
    if not os.path.isdir(path):
        raise ConfigError(f"--config-dir={path}: there is no folder {os.path.abspath(path)}")
    return Path(os.path.abspath(path))


# Composing


@contextlib.contextmanager
def _clean_hydra(entry: Entry) -> Iterator[None]:
    """hydra initialised for an entry, with stand-ins for NeMo's resolvers; both as they were afterwards."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton
    from hydra.version import VersionBase

    instances = Singleton._instances
    kinds = (GlobalHydra, VersionBase, Plugins)
    kept = {kind: instances.pop(kind) for kind in kinds if kind in instances}
    try:
        with _resolvers(), _without(UNUSED_PLUGIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            initialize_config_dir(str(entry.folder), version_base=entry.version_base)
            yield
    finally:
        for kind in kinds:
            instances.pop(kind, None)
        instances.update(kept)


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """A module that cannot be imported for a while; imported before, it is there again afterwards."""
    before = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(module)
        if before is not None:
            sys.modules[module] = before


@contextlib.contextmanager
def _resolvers() -> Iterator[None]:
    """Stand-ins for those of NeMo's resolvers that are not registered."""
    ours = [name for name in RESOLVERS if not OmegaConf.has_resolver(name)]
    for name in ours:
        OmegaConf.register_new_resolver(name, RESOLVERS[name], use_cache=False)
    try:
        yield
    finally:
        for name in ours:
            OmegaConf.clear_resolver(name)


def compose_entry(entry: Entry) -> DictConfig:
    """The composed config. Raises ConfigError in place of hydra's and YAML's exceptions."""
    from hydra import compose
    from hydra.errors import HydraException, MissingConfigException
    from yaml import YAMLError

    search = [f"hydra.searchpath=[file://{entry.extra_folder}]"] if entry.extra_folder else []
    with _clean_hydra(entry):
        try:
            cfg: DictConfig = compose(entry.name, [*entry.overrides, *search])
        except MissingConfigException as error:
            raise _missing(entry, error) from None
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # hydra's own for a group's number
            raise _bad_override(entry, error, search) from None
        except YAMLError as error:
            raise ConfigError(f"not readable as YAML: {_flat(error)}", place=entry.place) from None
        settle(cfg)
    return cfg


def settle(cfg: DictConfig) -> None:
    """Replace the interpolations that call one of NeMo's resolvers by their values."""
    with _resolvers():
        for path in _calls(OmegaConf.to_container(cfg, resolve=False)):
            with contextlib.suppress(OmegaConfBaseException):
                OmegaConf.update(cfg, path, OmegaConf.select(cfg, path))


def _calls(node: Any, path: str = "") -> Iterator[str]:
    """Paths of the values that call one of NeMo's resolvers."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _calls(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, str) and any(f"${{{name}:" in node for name in RESOLVERS):
        yield path


def _flat(error: BaseException) -> str:
    """An exception's text in one line."""
    return " ".join(str(error).split())


def _missing(entry: Entry, error: BaseException) -> ConfigError:
    """The primary file, or an option of a config group, that is not there."""
    files = sorted(file.stem for file in entry.folder.glob("*.y*ml"))
    stem = Path(entry.name).stem
    if stem in files or "primary config" not in str(error).lower():
        return _missing_option(entry, _flat(error))
    near = difflib.get_close_matches(stem, files, n=1)
    fix = f"did you mean --config-name={near[0]}?" if near else "see --config-path and --config-name"
    return ConfigError(f"there is no such file in {entry.folder}", place=entry.place, fix=fix)


def _missing_option(entry: Entry, said: str) -> ConfigError:
    """A file of a config group, with the group's nearest one. said: hydra's words."""
    found = re.search(
        r"Could not find '(.+)/([^/']+)' Available options in '[^']*': (.*?)(?: Config search path|$)", said
    )
    if found is None:
        return ConfigError(said.split(" Config search path")[0], place=entry.place)
    group, name, options = found[1], found[2], found[3].split()
    near = difflib.get_close_matches(name, options, n=1)
    fix = f"did you mean {near[0]}?" if near else f"use {or_list(options)}"
    return ConfigError(f"{group}={name} is not there", place=entry.place, fix=fix)


def _bad_override(entry: Entry, error: Exception, search: list[str]) -> ConfigError:
    """The override that does not fit the YAML, with the key that was probably meant."""
    from hydra import compose
    from hydra.errors import HydraException, OverrideParseException

    if isinstance(error, OverrideParseException):
        return ConfigError(f"cannot read the override {error.override}", place=entry.place, fix="write key=value")
    found = re.search(r"Could not override '([^']+)'", str(error))
    if found is None:
        return ConfigError(_flat(error), place=entry.place)
    key, table = found[1], load()
    section, _, name = key.rpartition(".")
    if table.knows(key):
        return ConfigError(f"{key} is not in this file", place=entry.place, fix=f"add it with +{key}=...")
    with contextlib.suppress(HydraException, OmegaConfBaseException):
        view = View(compose(entry.name, search))
        siblings = view.raw(section) if section else view.cfg
        if near := difflib.get_close_matches(name, [str(other) for other in siblings or ()], n=1, cutoff=0.8):
            return ConfigError(str(Unknown(key, f"{section}.{near[0]}".lstrip("."))), place=entry.place)
    meant = table.nearest(key)
    own = "" if meant.suggestion or meant.source else f"add a key of your own with +{key}=..."
    return ConfigError(str(meant), place=entry.place, fix=own)
