"""Word embeddings on ranks that divide the vocabulary, against megatron-core's own forward pass, to the bit."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, _model_parallel, forget_groups
from nxdt_nemo.testing.recipe import Layout, Recipe

pytestmark = pytest.mark.ranks

B, S, V, H = 3, 8, 48, 6


def upstreams() -> Any:
    """The forward pass that megatron-core's source has, whatever is in its place now."""
    from megatron.core.tensor_parallel import layers

    source = textwrap.dedent(inspect.getsource(layers))
    [made] = [node for node in ast.parse(source).body if getattr(node, "name", "") == "VocabParallelEmbedding"]
    [forward] = [node for node in made.body if getattr(node, "name", "") == "forward"]
    names: dict[str, Any] = dict(vars(layers))
    exec(compile(ast.Module([forward], []), layers.__file__, "exec"), names)
    return names["forward"]


def embedded(scattered: bool, deterministic: bool, dtype: str, ids: str) -> dict[str, Any]:
    """One rank's outputs and weight gradients, ours and upstream's."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    _model_parallel(Recipe.of("gpt"), Layout(tp=dist.get_world_size()))
    try:
        torch.manual_seed(5)
        whole = torch.randn(V, H)
        tokens = {
            "all": torch.randint(0, V, (B, S)),
            "first rank's": torch.randint(0, V // 4, (B, S)),
            "ends": torch.tensor([0, V // 2 - 1, V // 2, V - 1]).repeat(B, S // 4),
        }[ids]
        layer = VocabParallelEmbedding(
            V,
            H,
            init_method=torch.nn.init.zeros_,
            reduce_scatter_embeddings=scattered,
            config=SimpleNamespace(
                deterministic_mode=deterministic,
                use_cpu_initialization=True,
                perform_initialization=True,
                params_dtype=getattr(torch, dtype),
            ),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        with torch.no_grad():
            layer.weight.copy_(whole[layer.vocab_start_index : layer.vocab_end_index])
        found: dict[str, Any] = {}
        for name, forward in {"ours": layer.forward, "upstream's": upstreams().__get__(layer)}.items():
            layer.weight.grad = None
            output = forward(tokens)
            torch.manual_seed(7)
            output.backward(torch.randn(output.shape).to(output.dtype))
            found[name] = (output.detach(), layer.weight.grad)
        found["expected"] = torch.nn.functional.embedding(tokens, whole)
        found["class"] = type(layer).forward.__module__
        return found
    finally:
        forget_groups()


def accumulated(tied: bool, fused: bool) -> dict[str, Any]:
    """Two micro-batches' gradients in main_grad, as megatron-core's hooks leave them, and added up by index."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel import VocabParallelEmbedding
    from megatron.core.transformer import TransformerConfig

    _model_parallel(Recipe.of("gpt"), Layout(tp=dist.get_world_size()))
    try:
        config = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=1)
        group = parallel_state.get_tensor_model_parallel_group()
        layer = VocabParallelEmbedding(V, H, init_method=torch.nn.init.normal_, config=config, tp_group=group)
        layer.weight.zero_out_wgrad = tied
        layer.gradient_accumulation_fusion = fused
        model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), layer)
        model.zero_grad_buffer()
        expected = torch.zeros_like(layer.weight)
        for seed in (5, 6):
            made = torch.Generator().manual_seed(seed)
            tokens = torch.randint(0, V, (B, S), generator=made)
            direction = torch.randn(B, S, H, generator=made)
            model(tokens).backward(direction)
            mine = (tokens >= layer.vocab_start_index) & (tokens < layer.vocab_end_index)
            expected.index_put_((tokens[mine] - layer.vocab_start_index,), direction[mine], accumulate=True)
        added = layer.weight.grad_added_to_main_grad
        main_grad, left = layer.weight.main_grad.clone(), layer.weight.grad
        return {"found": main_grad, "expected": expected, "left": left, "in place": added}
    finally:
        forget_groups()


@pytest.mark.parametrize(
    ("ranks", "tied", "fused"), [(1, False, True), (1, True, True), (1, False, False), (2, False, True)]
)
def test_gradients_add_up_in_the_buffer(gloo, ranks, tied, fused):
    """A tied weight's takes the usual way, and so does every one without gradient_accumulation_fusion."""
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    for part in gloo(ranks, accumulated, tied, fused, init=ACTIVE, env=ACTIVE_ENV):
        assert torch.allclose(part["found"], part["expected"], rtol=0, atol=1e-6) and part["expected"].any()
        assert part["left"] is None
        assert part["in place"] is (fused and not tied)


CASES = [  # ranks, scattered over the sequence, deterministic_mode, dtype, ids
    (1, False, False, "float32", "all"),
    (2, False, False, "float32", "all"),
    (2, True, False, "float32", "all"),
    (2, True, True, "bfloat16", "all"),
    (2, False, False, "float32", "first rank's"),
    (2, True, False, "float32", "ends"),
    pytest.param(4, True, False, "float32", "all", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "scattered", "deterministic", "dtype", "ids"), CASES)
def test_equal_to_upstreams_to_the_bit(gloo, ranks, scattered, deterministic, dtype, ids):
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    parts = gloo(ranks, embedded, scattered, deterministic, dtype, ids, init=ACTIVE, env=ACTIVE_ENV)
    for part in parts:
        assert part["class"] == "nxdt_nemo.megatron.tensor_parallel.vocab_embedding"
        for mine, theirs in zip(part["ours"], part["upstream's"], strict=True):
            assert torch.equal(mine, theirs)
        assert part["ours"][1].any() or ids == "first rank's"
    found = torch.cat([part["ours"][0] for part in parts]) if scattered else parts[-1]["ours"][0].transpose(0, 1)
    expected = parts[0]["expected"].transpose(0, 1)
    assert torch.equal(found.float(), expected.to(found.dtype).float())


def test_no_write_at_an_index_is_in_the_graph(gloo):
    """The control: upstream's has one."""
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    for way, written in (("ours", False), ("upstream's", True)):
        found, _ = gloo(2, operations, way, init=ACTIVE, env=ACTIVE_ENV)
        assert any("index_put" in name for name in found) is written, (way, found)


def operations(way: str) -> list[str]:
    """Names of the operations that one forward and backward pass runs."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import VocabParallelEmbedding
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    _model_parallel(Recipe.of("gpt"), Layout(tp=dist.get_world_size()))
    try:
        config = SimpleNamespace(
            deterministic_mode=False,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=torch.float32,
        )
        group = parallel_state.get_tensor_model_parallel_group()
        layer = VocabParallelEmbedding(V, H, init_method=torch.nn.init.zeros_, config=config, tp_group=group)
        forward = layer.forward if way == "ours" else upstreams().__get__(layer)
        with Names():
            forward(torch.arange(S).repeat(B, 1)).sum().backward()
        return seen
    finally:
        forget_groups()
