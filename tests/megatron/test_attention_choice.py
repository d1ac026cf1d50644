"""Which implementation a call gets, why, and that it computes what upstream or the formula does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nxdt_nemo.errors import ConfigError
from nxdt_nemo.megatron.transformer import attention_choice, nki_flash
from nxdt_nemo.megatron.transformer.attention_choice import LONG, REFUSALS, ROWS, Call, choose
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, _model_parallel, forget_groups
from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.recipe import Layout, Recipe

DOCUMENT = Path(__file__).parents[2] / "docs" / "attention.md"
F32, BF16 = torch.float32, torch.bfloat16
BASE = Call("cpu", F32, 512, 512, 8, 4, 64, 64, causal=True)
FULL = replace(BASE, causal=False)  # both ways
RING = replace(BASE, parts=2)

CHOSEN = [
    ("sdpa", BASE),
    ("sdpa", replace(BASE, queries=1 << 15, keys=1 << 15)),
    ("sdpa", replace(BASE, lane="xla")),
    ("blocked", replace(BASE, lane="xla", queries=LONG, keys=LONG)),
    ("upstream", replace(BASE, dropout=True)),
    ("upstream", replace(BASE, queries=1)),
    ("upstream", replace(BASE, queries=2)),
    ("upstream", replace(BASE, queries=2, keys=LONG)),
    ("blocked", replace(BASE, queries=1, keys=LONG)),
    ("upstream", FULL),
    ("upstream", replace(FULL, masked=True)),
    ("blocked", replace(FULL, queries=LONG, keys=LONG)),
    ("blocked", replace(FULL, masked=True, queries=LONG, keys=LONG)),
    ("blocked", replace(FULL, masked=True, queries=64, keys=LONG)),
    ("upstream", replace(FULL, masked=True, queries=LONG, keys=LONG, dropout=True)),
    ("blocked", replace(BASE, packed=True)),
    ("blocked", replace(BASE, window=True)),
    ("blocked", replace(BASE, biased=True)),
    ("upstream", replace(BASE, packed=True, dropout=True)),
    ("blocked", replace(BASE, alibi=True, dropout=True)),
    ("blocked", replace(BASE, biased=True, dropout=True)),
    ("ring", RING),
    ("ring", replace(RING, dropout=True)),
    ("ring", replace(RING, packed=True, window=True)),
    ("all_to_all", replace(RING, comm="a2a")),
    ("all_gather", replace(RING, comm="all_gather", parts=8)),
]


@pytest.mark.parametrize("name, call", CHOSEN)
def test_chosen(name: str, call: Call) -> None:
    choice = choose(call)
    assert choice.name == name and len(choice.reason) > 20


@pytest.mark.parametrize(
    "call, place, words",
    [
        (replace(RING, alibi=True), "model.position_embedding_type", "set model.context_parallel_size=1"),
        (replace(RING, masked=True), "attention_mask", "context_parallel_size=2"),
        (replace(RING, biased=True), "attention_mask", "no bias"),
        (replace(RING, comm="a2a+p2p"), "model.cp_comm_type", "'a2a+p2p' is not available on this backend; use p2p"),
        (replace(RING, comm="a2a", parts=8), "model.cp_comm_type", "8 heads and 4 key groups"),
        (replace(RING, comm="a2a", parts=3), "model.cp_comm_type", "among 3 ranks; use p2p or all_gather"),
    ],
)
def test_refused_in_one_line(call: Call, place: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(call)
    assert caught.value.place == place and words in str(caught.value) and "\n" not in str(caught.value)


def test_every_row_is_taken_by_some_call(kernels: Any) -> None:
    wide = replace(BASE, lane="neuron", queries=LONG, keys=LONG)
    calls = [*(call for _, call in CHOSEN), wide]
    taken = {next(row for row in ROWS if row.fits(call)) for call in calls}
    assert taken == set(ROWS)


def test_the_document_has_the_table() -> None:
    text = DOCUMENT.read_text()
    rows = [f"| {row.when} | `{row.name}` | {row.reason} |" for row in ROWS]
    assert "\n".join(rows) in text
    assert all(f"| {refusal.when} | `{refusal.key}` |" in text for refusal in REFUSALS)


# --- NKI: what can be said without a Trainium ----------------------------------------------------------------------


class Kernel:
    """A kernel that is launched as NKI's are: kernel[samples, heads](...)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.function(grid, *args, **kwargs)


FIXED = {"use_causal_mask": True, "mixed_precision": True, "dropout_p": 0.0}


def documented_forward(grid: Any, q: Any, k: Any, v: Any, seed: Any, softmax_scale: float, **fixed: Any) -> Any:
    """q and k [b, n, d, s], v [b, n, s, d]: o [b, n, s, d], lse [b, n, 128, s / 128]."""
    assert seed is None and fixed == FIXED and grid == q.shape[:2] == k.shape[:2]
    scores = softmax_scale * q.transpose(-1, -2) @ k
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1).unflatten(-1, (-1, 128)).transpose(-1, -2)


def documented_backward(
    grid: Any, q: Any, k: Any, v: Any, o: Any, dy: Any, lse: Any, seed: Any, softmax_scale: float, **fixed: Any
) -> Any:
    """All [b, n, d, s], and so are the three gradients."""
    assert seed is None and fixed == FIXED and grid == q.shape[:2]
    q, k, v, o, dy = (x.transpose(-1, -2) for x in (q, k, v, o, dy))
    scores = softmax_scale * q @ k.transpose(-1, -2)
    weights = (scores - lse.transpose(-1, -2).flatten(-2).unsqueeze(-1)).exp()
    weights = weights.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), 0.0)
    slope = weights * (dy @ v.transpose(-1, -2) - (dy * o).sum(-1, keepdim=True)) * softmax_scale
    found = slope @ k, slope.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dy
    return tuple(x.transpose(-1, -2) for x in found)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the kernels were installed, in plain torch after their documentation."""
    found = nki_flash.Kernels(Kernel(documented_forward), Kernel(documented_backward))
    monkeypatch.setattr(nki_flash, "kernels", lambda: found)
    choose.cache_clear()
    yield
    choose.cache_clear()


class Cores(int):
    """nki.language.nc: a dimension of the launch grid that physical cores share."""

    def __mul__(self, each: int) -> Cores:
        return Cores(int(self) * each)


@pytest.mark.parametrize(
    ("said", "machine", "heads", "expected"),
    [
        ("2", "", 4, Cores(4)),
        ("", "trn2.48xlarge", 4, Cores(4)),
        ("1", "trn2.48xlarge", 4, 4),
        ("", "trn1.32xlarge", 4, 4),
        ("2", "", 3, 3),
    ],
)
def test_heads_are_divided_among_the_cores_of_a_logical_one(
    monkeypatch: pytest.MonkeyPatch, said: str, machine: str, heads: int, expected: int
) -> None:
    grids: list[Any] = []
    kernel = Kernel(lambda grid, *_, **__: grids.append(grid))
    found = nki_flash.Kernels(kernel, kernel, language=SimpleNamespace(nc=Cores))
    monkeypatch.setattr(nki_flash, "kernels", lambda: found)
    monkeypatch.setattr(nki_flash, "product_name", lambda: machine)
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", said)
    nki_flash._launch(kernel, torch.zeros(2, heads, 1, 1))()
    assert [(grid, type(grid[1])) for grid in grids] == [((2, expected), type(expected))]


def test_without_the_kernels_they_are_not_chosen() -> None:
    assert "no NKI kernels" in replace(BASE, lane="neuron").kernel_misfit
    assert "cpu lane" in BASE.kernel_misfit


def test_with_the_kernels_what_fits_them_goes_to_them(kernels: Any) -> None:
    fits = replace(BASE, lane="neuron", queries=LONG, keys=LONG, dtype=BF16)
    assert choose(fits).name == "nki_flash" and choose(replace(fits, lane="cpu")).name == "sdpa"
    changes = [{"queries": 3072, "keys": 3072}, {"features": 192, "values": 192}, {"dtype": torch.float64}]
    assert {choose(replace(fits, **change)).name for change in changes} == {"blocked"}
    assert choose(replace(fits, dropout=True)).name == "upstream"


@pytest.mark.parametrize("groups", [4, 2])
def test_nki_layouts_are_the_documented_ones(kernels: Any, groups: int) -> None:
    torch.manual_seed(2)
    leaves = [torch.randn(2, n, 256, 16, dtype=torch.float64, requires_grad=True) for n in (4, groups, groups)]
    direction = torch.randn(2, 4, 256, 16, dtype=torch.float64)
    found, expected = [], []
    for outs, function in (
        (found, lambda q, k, v: nki_flash.flash_attention(q, k, v, 0.3)),
        (
            expected,
            lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=0.3, enable_gqa=True
            ),
        ),
    ):
        y = function(*leaves)
        outs += [y.detach(), *torch.autograd.grad(y, leaves, direction)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


# --- our class, on a rank ---------------------------------------------------------------------------------------------

S, B, N, G, D = 24, 2, 4, 2, 16
Found = dict[str, torch.Tensor]
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run(gloo: Gloo) -> Iterator[Run]:
    """run(function, *args): its result, from a rank in which the backend is active."""
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")

    def call(function: Callable[..., Any], *args: Any) -> Any:
        return gloo(1, function, *args, init=ACTIVE, env=ACTIVE_ENV)[0]

    call(enter)
    yield call
    call(leave)


def enter() -> None:
    _model_parallel(Recipe.of("gpt"), Layout())


def leave() -> None:
    """The rank is the session's, and other tests make groups of their own."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    forget_groups()


def attended(options: dict[str, Any], ours: bool = True) -> Found:
    """One layer and one call of it: the result and the gradients.

    options  long: LONG in this call; mask_type, fields (of the config), keys, packed (lengths), masked, biased, mask (a
             tensor that is handed in)
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from nxdt_nemo.megatron.transformer.dot_product_attention import DotProductAttention

    fields = {"attention_dropout": 0.0, "masked_softmax_fusion": False} | options.get("fields", {})
    config = TransformerConfig(num_layers=1, hidden_size=N * D, num_attention_heads=N, num_query_groups=G, **fields)
    kind = DotProductAttention if ours else DotProductAttention.__mro__[1]
    layer = kind(config, 1, AttnMaskType[options.get("mask_type", "causal")], "self")
    *leaves, direction = inputs(options)
    leaves = [x.requires_grad_() for x in leaves]
    extra: dict[str, Any] = {}
    if options.get("biased"):
        extra["attention_bias"] = leaves[3]
    if options.get("packed") and ours:
        starts = torch.tensor([0, *options["packed"]]).cumsum(0).to(torch.int32)
        extra["packed_seq_params"] = packed_parameters(starts)
        *heads, direction = (x.squeeze(1) for x in (*leaves[:3], direction))
    else:
        heads = leaves[:3]
    kept, attention_choice.LONG = attention_choice.LONG, options.get("long", attention_choice.LONG)
    attention_choice.choose.cache_clear()
    model_parallel_cuda_manual_seed(3)
    try:
        y = layer(*heads, options.get("mask"), **extra)
    finally:
        attention_choice.LONG = kept
        attention_choice.choose.cache_clear()
    names = ("dq", "dk", "dv", "dbias")[: len(leaves)]
    gradients = torch.autograd.grad(y, leaves, direction)
    return {"y": y.detach().reshape(-1, leaves[0].shape[1], N * D), **dict(zip(names, gradients, strict=True))}


def packed_parameters(starts: torch.Tensor) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)


def inputs(options: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(9)
    keys, batch = options.get("keys", S), 1 if options.get("packed") else B
    shapes: list[tuple[int, ...]] = [(S, batch, N, D), *[(keys, batch, G, D)] * 2]
    shapes += [(1, N, S, keys)] * bool(options.get("biased"))
    return [torch.randn(shape) for shape in (*shapes, (S, batch, N * D))]


def formula(options: dict[str, Any], unseen: torch.Tensor) -> Found:
    """In float64; True of unseen [S, keys] hides."""
    *made, direction = (x.double() for x in inputs(options))
    leaves = [x.requires_grad_() for x in made]
    key, value = (x.repeat_interleave(N // G, 2) for x in leaves[1:3])
    scores = torch.einsum("sbnd,tbnd->bnst", leaves[0], key) / math.sqrt(D)
    scores = scores + leaves[3] if options.get("biased") else scores
    y = torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(unseen, -math.inf).softmax(-1), value).flatten(2)
    names = ("dq", "dk", "dv", "dbias")[: len(leaves)]
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, direction), strict=True))}


def errors(found: Found, expected: Found) -> dict[str, float]:
    assert found.keys() == expected.keys()
    largest = {name: float(reference.double().abs().max()) for name, reference in expected.items()}
    return {name: float((found[name].double() - expected[name].double()).abs().max()) / largest[name] for name in found}


def hidden(length: int, left: int = -1, right: int = -1, packed: tuple[int, ...] = ()) -> torch.Tensor:
    gap = torch.arange(length) - torch.arange(length)[:, None]
    mask = torch.zeros(length, length, dtype=torch.bool)
    if right >= 0:
        mask |= gap > right
    if left >= 0:
        mask |= gap < -left
    names = torch.tensor([number for number, size in enumerate(packed) for _ in range(size)])
    return mask | (names[:, None] != names) if packed else mask


PACKED = (9, 1, 14)
FORMULAS = {
    "window": ({"fields": {"window_size": (5, 0)}}, hidden(S, 5, 0)),
    "window, its right half under a causal layer": ({"fields": {"window_size": (5, 3)}}, hidden(S, 5, 0)),
    "window, both ways": ({"fields": {"window_size": (5, 3)}, "mask_type": "no_mask"}, hidden(S, 5, 3)),
    "packed": ({"packed": PACKED}, hidden(S, right=0, packed=PACKED)),
    "packed, padding_causal": ({"packed": PACKED, "mask_type": "padding_causal"}, hidden(S, right=0, packed=PACKED)),
    "packed, both ways": ({"packed": PACKED, "mask_type": "padding"}, hidden(S, packed=PACKED)),
    "packed, window": ({"packed": PACKED, "fields": {"window_size": (4, 0)}}, hidden(S, 4, 0, PACKED)),
    "bias": ({"biased": True, "mask_type": "no_mask"}, hidden(S)),
    "bias, causal": ({"biased": True}, hidden(S, right=0)),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", FORMULAS)
def test_beyond_upstream_it_is_the_formula(run: Run, name: str) -> None:
    options, unseen = FORMULAS[name]
    found = errors(run(attended, options), formula(options, unseen))
    assert max(found.values()) <= 1e-6, found


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["window", "packed", "packed, window"])
def test_with_dropout_it_is_upstreams_with_that_mask_to_the_bit(run: Run, name: str) -> None:
    options, unseen = FORMULAS[name]
    dropped = {**options, "fields": {**options.get("fields", {}), "attention_dropout": 0.3}}
    ours = run(attended, dropped)
    plain = {**dropped, "fields": {"attention_dropout": 0.3}, "mask": unseen[None, None]}
    theirs = run(attended, plain, False)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert max(errors(ours, formula(options, unseen)).values()) > 1e-2


def padding(keys: int) -> torch.Tensor:
    """BERT's and T5's [B, 1, S, keys]: the second sample's last keys, and all keys of some queries."""
    mask = torch.zeros(B, 1, S, keys, dtype=torch.bool)
    mask[1, :, :, keys - 5 :] = mask[0, :, 3] = mask[1, :, S - 5 :] = True
    return mask


LONGER = {
    "both ways": {"mask_type": "no_mask"},
    "a padding mask": {"mask_type": "padding", "mask": padding(S)},
    "cross attention": {"mask_type": "padding", "mask": padding(40), "keys": 40},
    "a causal mask that is handed in": {"mask": padding(S) | hidden(S, right=0)},
    "a mask of one row": {"mask_type": "padding", "mask": padding(S)[:, :, :1]},
    "cross attention, no mask": {"mask_type": "no_mask", "keys": 40},
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", LONGER)
def test_long_ones_equal_upstreams(run: Run, name: str) -> None:
    """BERT, T5 and masked GPT: the block kernel is taken, and it is not upstream's to the bit."""
    ours, theirs = run(attended, {**LONGER[name], "long": S}), run(attended, LONGER[name], False)
    found = errors(ours, theirs)
    assert 0 < max(found.values()) <= 1e-6, found
    short = run(attended, LONGER[name])
    assert all(torch.equal(short[key], theirs[key]) for key in theirs)


@pytest.mark.ranks
def test_a_mask_that_is_left_out_would_be_seen(run: Run) -> None:
    ours = run(attended, {"mask_type": "padding", "long": S})
    theirs = run(attended, LONGER["a padding mask"], False)
    assert min(errors(ours, theirs).values()) > 1e-2
