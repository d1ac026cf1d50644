"""Write configs/keys/nemo-<version>.json: every configuration key that the installed NeMo knows; and beside it
values-<version>.json: the kinds of value that each takes, and what it is when nobody writes it.

    python tools/keys.py PATH_TO_NEMO_CHECKOUT [--output FILE]

The table is the union of
  a  the key paths of the stock language-modeling YAMLs of the checkout,
  b  the key names that NeMo's code reads from a config (found in the syntax tree, nothing is imported),
  c  the fields of megatron-core's config dataclasses, which NeMo copies into the model by name,
  d  the arguments of Lightning's Trainer and of NeMo's optimizers and schedulers.
Run it when a pin in pyproject.toml moves. Keys that this finds no trace of go by hand into configs/keys/extra.toml.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import yaml
from keys_lib import values as v
from omegaconf import OmegaConf

Sections = dict[str, set[str]]

ROOT = Path(__file__).resolve().parents[1]
OURS_COUNT = 1000  # what one of ours writes is usual
# Our own configurations, and the kind of model that writes what is in them.
OURS = (
    *(("parts/base.yaml", model) for model in ("gpt", "bert", "t5", "tuning")),
    *((f"{part}.yaml", "gpt") for part in ("parts/gpt*", "parts/llama", "model/gpt*", "model/llama*", "model/mi*")),
    *(
        (f"{part}.yaml", "tuning")
        for part in ("parts/gpt*", "parts/llama", "parts/tuning", "workflow/sft", "workflow/lora")
    ),
    *(("workflow/pretrain.yaml", model) for model in ("gpt", "bert", "t5")),
    *(("target/trn1.yaml", model) for model in ("gpt", "bert", "t5", "tuning")),
    ("model/llama*.yaml", "tuning"),
    ("layout/trn*/*.yaml", "gpt"),
    ("model/bert.yaml", "bert"),
    ("model/t5.yaml", "t5"),
)
STOCK = ("examples/nlp/language_modeling/conf/*.yaml", "examples/nlp/language_modeling/tuning/conf/*.yaml")
SCRIPTS = ("examples/nlp/language_modeling/*.py", "examples/nlp/language_modeling/tuning/*.py")
READERS = ("nemo/collections/nlp/**/*.py", "nemo/core/**/*.py", "nemo/utils/callbacks/dist_ckpt_io.py")

# Files whose `cfg` is the whole config or another section than `model`.
ROOT_OF_FILE = {
    "nemo/collections/nlp/parts/megatron_trainer_builder.py": "",
    "nemo/collections/nlp/parts/peft_config.py": "model",
    "nemo/utils/exp_manager.py": "exp_manager",
}
TOP = {"trainer", "model", "exp_manager"}
# What a config is called inside NeMo, and the section it then is.
NAMES = {
    "cfg": None,
    "_cfg": None,
    "hparams": "model",
    "model_cfg": "model",
    "data_cfg": "model.data",
    "optim_config": "model.optim",
    "optim_cfg": "model.optim",
    "scheduler_config": "model.optim.sched",
    "sched_config": "model.optim.sched",
    "tokenizer_cfg": "model.tokenizer",
    "peft_cfg": "model.peft",
    "lora_cfg": "model.peft.lora_tuning",
}
# Methods of a config, never keys.
METHODS = {"get", "items", "keys", "values", "pop", "copy", "update", "setdefault", "merge_with"}

# Dataclasses whose fields are the keys of a section: (distribution, file, class, section).
DATACLASSES = (
    ("megatron-core", "megatron/core/model_parallel_config.py", "ModelParallelConfig", "model"),
    ("megatron-core", "megatron/core/transformer/transformer_config.py", "TransformerConfig", "model"),
    ("megatron-core", "megatron/core/transformer/transformer_config.py", "MLATransformerConfig", "model"),
    ("megatron-core", "megatron/core/optimizer/optimizer_config.py", "OptimizerConfig", "model.optim"),
    ("nemo_toolkit", "nemo/utils/exp_manager.py", "ExpManagerConfig", "exp_manager"),
    ("nemo_toolkit", "nemo/utils/exp_manager.py", "CallbackParams", "exp_manager.checkpoint_callback_params"),
    ("nemo_toolkit", "nemo/utils/exp_manager.py", "EarlyStoppingParams", "exp_manager.early_stopping_callback_params"),
    ("nemo_toolkit", "nemo/utils/exp_manager.py", "StepTimingParams", "exp_manager.step_timing_kwargs"),
    ("nemo_toolkit", "nemo/utils/exp_manager.py", "EMAParams", "exp_manager.ema"),
    ("nemo_toolkit", "nemo/utils/exp_manager.py", "StragglerDetectionParams", "exp_manager.straggler_detection_params"),
    ("nemo_toolkit", "nemo/utils/exp_manager.py", "FaultToleranceParams", "exp_manager.fault_tolerance"),
    ("nemo_toolkit", "nemo/core/config/optimizers.py", "*", "model.optim"),
    ("nemo_toolkit", "nemo/core/config/schedulers.py", "*", "model.optim.sched"),
)
# Classes whose constructor arguments are the keys of a section.
CONSTRUCTORS = (
    ("lightning", "lightning/pytorch/trainer/trainer.py", "Trainer", "trainer"),
    ("nemo_toolkit", "nemo/core/optim/lr_scheduler.py", "*", "model.optim.sched"),
    ("nemo_toolkit", "nemo/core/optim/distributed_adam.py", "*", "model.optim"),
    ("nemo_toolkit", "nemo/core/optim/megatron_fused_adam.py", "*", "model.optim"),
)
NOT_KEYS = {"self", "params", "optimizer", "args", "kwargs"}


def installed(name: str, file: str) -> Path:
    """The path of a file of an installed distribution."""
    return Path(str(distribution(name).locate_file(file)))


def walk_yaml(node: object, section: str, found: Sections) -> None:
    """Add the keys of a parsed YAML to found; the entries of a list share one set of keys."""
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(key, str) and key not in ("hydra", "defaults"):
                found[section].add(key)
                walk_yaml(value, f"{section}.{key}" if section else key, found)
    elif isinstance(node, list):
        for value in node:
            walk_yaml(value, section, found)


def chain(node: ast.AST) -> tuple[str | None, list[str]] | None:
    """`self.cfg.data.get('fim')` as (section of the config or None for the file's own, ['data', 'fim'])."""
    match node:
        case ast.Name(id=name) if name in NAMES:
            return NAMES[name], []
        case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in NAMES:
            return NAMES[name], []
        case ast.Attribute(value=value, attr=name):
            base = chain(value)
            return base if base is None or name in METHODS else (base[0], [*base[1], name])
        case ast.Call(func=ast.Attribute(value=value, attr="get" | "pop"), args=[ast.Constant(value=str(key)), *_]):
            base = chain(value)
            return None if base is None else (base[0], [*base[1], key])
        case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[value, ast.Constant(value=str(key)), *_]):
            base = chain(value)
            return None if base is None else (base[0], [*base[1], key])
        case ast.Call(func=ast.Name(id="get_config_arg"), args=[ast.Constant(value=str(key)), *_]):
            return "model.optim", [key]
        case ast.Subscript(value=value, slice=ast.Constant(value=str(key))):
            base = chain(value)
            return None if base is None else (base[0], [*base[1], key])
        case ast.Compare(left=ast.Constant(value=str(key)), ops=[ast.In() | ast.NotIn()], comparators=[value]):
            base = chain(value)
            return None if base is None else (base[0], [*base[1], key])
        case ast.BoolOp(values=[value, *_]):
            return chain(value)
    return None


def reads(tree: ast.AST, root: str) -> Iterator[tuple[str, str]]:
    """(section, key) for each key that some code reads from a config."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        found = None if id(node) in called else chain(node)
        if not found or not found[1]:
            continue
        section, keys = found
        if section is None:
            section = "" if keys[0] in TOP else root
        for key in keys:
            if not key.isidentifier() or key.startswith("__"):
                break
            yield section, key
            section = f"{section}.{key}" if section else key


def mains(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """The functions of a script that hydra hands the whole config."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any("hydra" in ast.unparse(d) for d in node.decorator_list):
            yield node


def parsed(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def walk_stock(files: list[Path], found: Sections) -> None:
    """Add the keys of the stock YAMLs; one without a trainer is a fragment that others include.

    Their defaults list says where: `.@model.encoder: fragment`.
    """
    loaded = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    whole = {name: config for name, config in loaded.items() if "trainer" in config}
    for config in whole.values():
        walk_yaml(config, "", found)
        included = [pair for entry in config.get("defaults", []) if isinstance(entry, dict) for pair in entry.items()]
        for where, fragment in included:
            section = where.partition("@")[2]
            if section and fragment in loaded:
                found[section.rpartition(".")[0]].add(section.rpartition(".")[2])
                walk_yaml(loaded[fragment], section, found)


def classes(file: Path, wanted: str) -> Iterator[ast.ClassDef]:
    """The classes of a file by name, or all of them for `*`."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ClassDef) and wanted in ("*", node.name):
            yield node


def fields(node: ast.ClassDef) -> set[str]:
    """The annotated fields of a class body."""
    return {s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)}


def arguments(node: ast.ClassDef) -> set[str]:
    """The arguments of a class's constructor."""
    inits = [s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"]
    return {a.arg for s in inits for a in (*s.args.args, *s.args.kwonlyargs)}


def table(checkout: Path) -> dict[str, Any]:
    """The whole key table as it is written to the file."""
    found: Sections = defaultdict(set)
    stock = sorted(file for pattern in STOCK for file in checkout.glob(pattern))
    walk_stock(stock, found)
    for file in sorted(file for pattern in SCRIPTS for file in checkout.glob(pattern)):
        for main_function in mains(parsed(file)):
            for section, key in reads(main_function, ""):
                found[section].add(key)
    base = installed("nemo_toolkit", "")
    readers = [file for pattern in READERS for file in base.glob(pattern)] + [base / "nemo/utils/exp_manager.py"]
    for file in sorted(readers):
        for section, key in reads(parsed(file), ROOT_OF_FILE.get(str(file.relative_to(base)), "model")):
            found[section].add(key)
    for name, path, wanted, section in DATACLASSES:
        for node in classes(installed(name, path), wanted):
            found[section] |= {key for key in fields(node) if not key.startswith("_")}
    for name, path, wanted, section in CONSTRUCTORS:
        for node in classes(installed(name, path), wanted):
            found[section] |= arguments(node) - NOT_KEYS
    return {
        "generated_by": "tools/keys.py",
        "versions": {name: version(name) for name in ("nemo_toolkit", "megatron-core", "lightning")},
        "stock_yamls": len(stock),
        "sections": {section: sorted(keys) for section, keys in sorted(found.items()) if keys},
    }


def gets(tree: ast.AST, root: str) -> Iterator[tuple[tuple[str, str], v.Value]]:
    """(section, key) and the default of each `cfg.get("key", default)`."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=value, attr="get"), args=[ast.Constant(value=str(key)), *rest]):
                base = chain(value)
            case _:
                continue
        if base is None or not key.isidentifier():
            continue
        section = (root if not base[1] or base[1][0] not in TOP else "") if base[0] is None else base[0]
        found = v.Value()
        default = v.literal(rest[0]) if rest else None
        if default is not None and default is not v.UNKNOWN:
            found.kinds.add(v.kind_of(default))
        found.add("get", default)
        yield (".".join([part for part in (section, *base[1]) if part]), key), found


def values(checkout: Path, known: dict[str, list[str]]) -> dict[str, Any]:
    """What values the known keys take."""
    found: v.Found = defaultdict(v.Value)
    yamls: Counter[str] = Counter()
    for file in sorted(file for pattern in STOCK for file in checkout.glob(pattern)):
        # As hydra reads it: 1e-4 is a number there, and a text for PyYAML.
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        if "trainer" in config:
            yamls[v.model_of(config)] += 1
            v.of_stock(config, "", found, v.model_of(config))
    side = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "parts" / "t5_side.yaml"), resolve=False)
    v.of_stock({"model": {"encoder": side, "decoder": side}}, "", found, "t5", OURS_COUNT)
    for pattern, model in OURS:
        for file in sorted((ROOT / "configs").glob(pattern)):
            v.of_stock(OmegaConf.to_container(OmegaConf.load(file), resolve=False), "", found, model, OURS_COUNT)
    base = installed("nemo_toolkit", "")
    for file in sorted(file for pattern in READERS for file in base.glob(pattern)):
        for place, value in gets(parsed(file), ROOT_OF_FILE.get(str(file.relative_to(base)), "model")):
            v.merge(found[place], value)
    for table, members in ((DATACLASSES, v.of_fields), (CONSTRUCTORS, v.of_arguments)):
        for name, path, wanted, section in table:
            for node in classes(installed(name, path), wanted):
                for key, value in members(node):
                    v.merge(found[section, key], value)
    return v.dumped(found, known, yamls)


def dump_values(made: dict[str, Any]) -> str:
    """JSON with one key a line."""
    sections = []
    for section, keys in made.items():
        rows = ",\n".join(f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in keys.items())
        sections.append(f"  {json.dumps(section)}: {{\n{rows}\n  }}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def dump(value: dict[str, Any]) -> str:
    """JSON with one section a line, so that a diff shows what moved."""
    head = {key: item for key, item in value.items() if key != "sections"}
    lines = [f"  {json.dumps(key)}: {json.dumps(item)}," for key, item in head.items()]
    rows = [f"    {json.dumps(key)}: {json.dumps(item)}" for key, item in value["sections"].items()]
    return "{\n" + "\n".join(lines) + '\n  "sections": {\n' + ",\n".join(rows) + "\n  }\n}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the table of known configuration keys.")
    parser.add_argument("checkout", type=Path, help="folder of a NeMo checkout")
    parser.add_argument("--output", type=Path, help="file to write (default: configs/keys/nemo-<version>.json)")
    options = parser.parse_args()
    made = table(options.checkout)
    if not made["stock_yamls"]:
        raise SystemExit(f"{options.checkout}: no stock YAMLs under examples/nlp/language_modeling")
    nemo = made["versions"]["nemo_toolkit"].rsplit(".", 1)[0]
    output = options.output or ROOT / "configs" / "keys" / f"nemo-{nemo}.json"
    output.write_text(dump(made), encoding="utf-8")
    other = output.with_name(output.name.replace("nemo-", "values-"))
    other.write_text(dump_values(values(options.checkout, made["sections"])), encoding="utf-8")
    total = sum(len(keys) for keys in made["sections"].values())
    print(f"{output}: {len(made['sections'])} sections, {total} keys from {made['stock_yamls']} YAMLs and the sources")


if __name__ == "__main__":
    main()
