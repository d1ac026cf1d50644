"""The names that docs/core.md gives to users, and docs/nxd_symbols.md's table of NxD Core's, against its source."""

from __future__ import annotations

import ast
import importlib
import os
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLIC = """
nxdt_nemo.activate nxdt_nemo.deactivate nxdt_nemo.is_active
nxdt_nemo.megatron.models.gpt.gpt_layer_specs.get_gpt_block_spec
nxdt_nemo.megatron.models.gpt.gpt_layer_specs.get_gpt_layer_spec
nxdt_nemo.megatron.models.backends.adapt nxdt_nemo.megatron.fusions.fused_layer_norm.Norm
nxdt_nemo.megatron.transformer.dot_product_attention.DotProductAttention
nxdt_nemo.megatron.transformer.attention.SelfAttention
nxdt_nemo.megatron.transformer.context_parallel.ring_attention
nxdt_nemo.megatron.parallel_state.meshes nxdt_nemo.megatron.memory.Job nxdt_nemo.megatron.memory.estimate
nxdt_nemo.runtime.current nxdt_nemo.runtime.Lane nxdt_nemo.runtime.Group
nxdt_nemo.runtime.collectives.all_reduce nxdt_nemo.runtime.collectives.all_gather
nxdt_nemo.runtime.collectives.reduce_scatter nxdt_nemo.runtime.collectives.all_to_all
nxdt_nemo.runtime.collectives.ring nxdt_nemo.data.arrow.TokenRows nxdt_nemo.testing.pool.RankPool
megatron.core.parallel_state.initialize_model_parallel
megatron.core.tensor_parallel.model_parallel_cuda_manual_seed
megatron.core.parallel_state.get_tensor_model_parallel_rank
megatron.core.parallel_state.get_tensor_model_parallel_world_size
megatron.core.parallel_state.get_pipeline_model_parallel_rank
megatron.core.parallel_state.get_pipeline_model_parallel_world_size
megatron.core.parallel_state.get_data_parallel_rank megatron.core.parallel_state.get_data_parallel_world_size
megatron.core.parallel_state.is_pipeline_first_stage megatron.core.parallel_state.is_pipeline_last_stage
megatron.core.tensor_parallel.ColumnParallelLinear megatron.core.tensor_parallel.RowParallelLinear
megatron.core.tensor_parallel.VocabParallelEmbedding megatron.core.tensor_parallel.vocab_parallel_cross_entropy
megatron.core.tensor_parallel.set_tensor_model_parallel_attributes
megatron.core.models.gpt.GPTModel megatron.core.transformer.module.MegatronModule
megatron.core.transformer.transformer_config.TransformerConfig megatron.core.enums.ModelType
megatron.core.pipeline_parallel.get_forward_backward_func megatron.core.distributed.DistributedDataParallel
megatron.core.distributed.DistributedDataParallelConfig megatron.core.distributed.finalize_model_grads
megatron.core.optimizer.OptimizerConfig megatron.core.optimizer.get_megatron_optimizer
megatron.core.dist_checkpointing.save megatron.core.dist_checkpointing.load
megatron.core.transformer.utils.make_sharded_tensors_for_checkpoint
megatron.core.transformer.utils.sharded_state_dict_default
""".split()
SLOW = ("nemo.", "lightning.", "nxdt_nemo.lightning.")  # seconds to import


def cells(page: str) -> list[list[str]]:
    """A page's table, without its head."""
    rows = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def missing(names: list[str]) -> list[str]:
    """Those that no import gives."""
    return [name for name in names if not _found(name)]


def _found(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


def heres() -> list[str]:
    return sorted({name for _, _, here, _ in cells("nxd_symbols.md") for name in code(here)})


def test_the_documented_names_are_these() -> None:
    assert [name for row in cells("core.md") for name in code(row[0])] == PUBLIC


@pytest.mark.ranks
def test_every_name_can_be_imported(active) -> None:
    light = [name for name in heres() if not name.startswith(SLOW)]
    assert active(missing, [*PUBLIC, *light]) == []
    assert active(missing, ["megatron.core.tensor_parallel.Nothing", "megatron.nothing.core"]) != []


@pytest.mark.slow
@pytest.mark.ranks
def test_every_name_of_nemo_can_be_imported(active) -> None:
    assert active(missing, [name for name in heres() if name.startswith(SLOW)]) == []


def test_what_has_no_counterpart_says_why() -> None:
    for module, symbols, here, note in cells("nxd_symbols.md"):
        assert code(module) and code(symbols), module
        assert (here == "none" and note) or len(code(here)) == 1, f"{module} {symbols}"


@pytest.mark.upstream
def test_the_table_is_of_all_that_nxd_core_has() -> None:
    source = os.environ.get("NXDT_NXD_SOURCE")
    if not source:
        pytest.skip("NXDT_NXD_SOURCE names no checkout of neuronx-distributed")
    public = defined(Path(source) / "src" / "neuronx_distributed")
    assert len(public) > 400
    listed: Counter[tuple[str, str]] = Counter()
    for row in cells("nxd_symbols.md"):
        (module,) = code(row[0])
        listed.update(named(module, code(row[1]), public))
    assert sorted(public - listed.keys()) == []
    assert sorted(pair for pair, times in listed.items() if times > 1) == []


def named(module: str, symbols: list[str], public: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """(module, symbol) of a row; each has to be there."""
    inside = module.removesuffix(".**")
    pairs = [(m, n) for m, n in public if m == module or (module != inside and f"{m}.".startswith(f"{inside}."))]
    if symbols != ["*"]:
        pairs = [(module, symbol) for symbol in symbols]
    assert pairs and set(pairs) <= public, f"{module}: {sorted(set(pairs) - public) or 'nothing is there'}"
    return pairs


def defined(package: Path) -> set[tuple[str, str]]:
    """(module, name) of each class and function at the top of a module, but for names with a leading underscore."""
    found = set()
    for file in sorted(package.rglob("*.py")):
        module = ".".join(file.relative_to(package).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                found.add((module, node.name))
    return found
