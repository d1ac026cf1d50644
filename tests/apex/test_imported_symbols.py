"""Every Apex name that NeMo and megatron-core import is in the room, or is left out on purpose."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

# module                                          names imported from it ("" for the module itself)
IMPORTED = {
    "amp_C": {""},
    "apex": {"", "amp"},
    "apex._autocast_utils": {"_cast_if_autocast_enabled"},
    "apex.contrib.group_norm": {"GroupNorm"},
    "apex.contrib.layer_norm.layer_norm": {"FastLayerNorm", "FastLayerNormFN", "_fast_layer_norm"},
    "apex.contrib.optimizers.distributed_fused_adam": {
        "DistributedFusedAdam",
        "_disable_pre_forward_hook",
        "_multi_tensor_copy",
    },
    "apex.multi_tensor_apply": {"multi_tensor_applier"},
    "apex.normalization": {"FusedLayerNorm", "MixedFusedRMSNorm"},
    "apex.normalization.fused_layer_norm": {"FusedLayerNorm", "FusedLayerNormAffineFunction", "MixedFusedLayerNorm"},
    "apex.optimizers": {"FusedAdam", "FusedLAMB", "FusedSGD"},
    "apex.transformer": {"parallel_state", "tensor_parallel"},
    "apex.transformer.enums": {"AttnMaskType", "AttnType", "ModelType"},
    "apex.transformer.functional.fused_softmax": {"FusedScaleMaskSoftmax"},
    "apex.transformer.layers.layer_norm": {"FastLayerNorm", "MixedFusedLayerNorm"},
    "apex.transformer.log_util": {"set_logging_level"},
    "apex.transformer.microbatches": {"ConstantNumMicroBatches"},
    "apex.transformer.pipeline_parallel.schedules.common": {"listify_model"},
    "apex.transformer.pipeline_parallel.utils": {
        "_GLOBAL_NUM_MICROBATCHES_CALCULATOR",
        "_reconfigure_microbatch_calculator",
        "get_current_global_batch_size",
        "get_micro_batch_size",
        "get_num_microbatches",
        "setup_microbatch_calculator",
        "update_num_microbatches",
    },
    "apex.transformer.tensor_parallel.layers": {
        "set_defaults_if_not_set_tensor_model_parallel_attributes",
        "set_tensor_model_parallel_attributes",
    },
    "apex.transformer.utils": {"divide"},
    "fused_weight_gradient_mlp_cuda": {""},
    "scaled_masked_softmax_cuda": {""},
    "scaled_softmax_cuda": {""},
    "scaled_upper_triang_masked_softmax_cuda": {""},
}

# module                            why its absence is right
LEFT_OUT = {
    "apex.contrib.nccl_allocator": "upstream catches the ImportError and allocates with torch",
    "fused_adan": "an extension of the Adan authors, not of Apex; imported when its optimizer steps",
}

ROOTS = re.compile(r"^(apex|apex_C|amp_C|syncbn|\w+_cuda|fused_\w+|fast_\w+|xentropy\w*)(\.|$)")
MENTION = re.compile(r"import\s+\w|from\s+\w")
CUDA_WORD = re.compile(r"apex|amp_C|_cuda|fused_|fast_|syncbn|xentropy")


def upstream_sources() -> Iterator[Path]:
    """The Python files of the installed nemo_toolkit and megatron-core that are worth parsing."""
    for name in ("nemo_toolkit", "megatron-core"):
        found = distribution(name)
        for entry in found.files or []:
            if entry.suffix == ".py" and entry.parts[0] in ("nemo", "megatron"):
                yield Path(str(found.locate_file(entry)))


def imports_of(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each absolute import of an Apex module; name "" for `import module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if ROOTS.match(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and ROOTS.match(node.module):
            yield from ((node.module, alias.name) for alias in node.names)


def found_upstream() -> dict[str, set[str]]:
    table: dict[str, set[str]] = {}
    for path in upstream_sources():
        source = path.read_text(encoding="utf-8")
        if not any(CUDA_WORD.search(line) for line in source.splitlines() if MENTION.search(line)):
            continue
        for module, name in imports_of(source):
            table.setdefault(module, set()).add(name)
    return table


# Prints the names of the table on stdin that the room does not answer. Apart, since some answers import megatron.core.
RESOLVE = """
import importlib, json, sys
missing = []
for module, names in json.load(sys.stdin).items():
    ours = "nxdt_nemo." + module if module.split(".")[0] == "apex" else "nxdt_nemo.apex." + module
    for name in names:
        try:
            found = importlib.import_module(ours)
            if name and not hasattr(found, name):
                importlib.import_module(ours + "." + name)
        except ImportError:
            missing.append([module, name])
print("RESULT", json.dumps(sorted(missing)))
"""


def unresolved(table: dict[str, set[str]]) -> list[list[str]]:
    run = subprocess.run(
        [sys.executable, "-c", RESOLVE],
        input=json.dumps({module: sorted(names) for module, names in table.items()}),
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = (text for text in run.stdout.splitlines() if text.startswith("RESULT "))
    result: list[list[str]] = json.loads(line.removeprefix("RESULT "))
    return result


def test_the_table_is_what_upstream_imports() -> None:
    pytest.importorskip("nemo")
    assert found_upstream() == {**IMPORTED, **{module: {""} for module in LEFT_OUT}}


def test_every_name_is_answered_or_left_out() -> None:
    pytest.importorskip("megatron.core.package_info")
    asked = {**IMPORTED, **{module: {""} for module in LEFT_OUT}}
    asked["apex.nowhere"] = {""}
    asked["apex.optimizers"] = asked["apex.optimizers"] | {"FusedEverything"}
    left_out = [[module, ""] for module in LEFT_OUT]
    assert unresolved(asked) == sorted([*left_out, ["apex.nowhere", ""], ["apex.optimizers", "FusedEverything"]])


def test_the_scan_sees_each_form_of_import() -> None:
    source = (
        "import amp_C\ndef f():\n    from apex.a import b, c as d\ntry:\n    import apex.x.y as z\nexcept E: pass\n"
    )
    assert set(imports_of(source)) == {("amp_C", ""), ("apex.a", "b"), ("apex.a", "c"), ("apex.x.y", "")}
    assert not set(imports_of("from .apex import x\nimport apexlike\nfrom torch import cuda\n"))


ROOM = "nxdt_nemo.apex"
EVERYTHING = ", ".join(
    f"{ROOM}.{module}"
    for module in (
        "amp",
        "amp_C",
        "contrib.group_norm",
        "contrib.optimizers.distributed_fused_adam",
        "normalization",
        "optimizers",
        "transformer.functional",
        "transformer.layers",
        "transformer.microbatches",
        "transformer.parallel_state",
        "transformer.pipeline_parallel.utils",
        "transformer.tensor_parallel.layers",
    )
)


def loaded_after(statement: str) -> list[str]:
    """Modules of upstream and of rooms other than apex/ that the statement brings into a fresh process."""
    code = f"{statement}\nimport sys\nprint('RESULT', *sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = (text for text in run.stdout.splitlines() if text.startswith("RESULT "))
    ours = re.compile(r"nxdt_nemo\.(cli|audit|nemo|lightning|megatron|config|checkpoint|data|testing)(\.|$)")
    upstream = re.compile(r"(nemo|megatron|lightning|pytorch_lightning|torch_xla|apex|transformer_engine)(\.|$)")
    return sorted(name for name in line.split()[1:] if ours.match(name) or upstream.match(name))


@pytest.mark.parametrize("statement", [f"import {ROOM}", f"import {EVERYTHING}"], ids=["the package", "every module"])
def test_the_room_imports_no_room_above_and_no_upstream(statement: str) -> None:
    assert loaded_after(statement) == []


def test_that_check_can_fail() -> None:
    code = "import sys, types; sys.modules['megatron.core'] = sys.modules['nxdt_nemo.data'] = types.ModuleType('x')"
    assert loaded_after(code) == ["megatron.core", "nxdt_nemo.data"]


def test_attributes_after_a_bare_import() -> None:
    code = f"import {ROOM} as apex; print('torch' in __import__('sys').modules, apex.optimizers.FusedAdam.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-2:] == ["False", "FusedAdam"]
