"""ZeRO-1 against the unsharded optimizer in the same layout; its memory; its checkpoints in other layouts.

A plain megatron-core loop. The same through NeMo: tests/nemo/test_zero.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from nxdt_nemo.testing.matrix import recipe_of
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, assemble
from nxdt_nemo.testing.parity import NO_CLIPPING, relative
from nxdt_nemo.testing.pool import RankError
from nxdt_nemo.testing.recipe import FAMILIES, Recipe, layout
from nxdt_nemo.testing.script_run import read_tensors

pytestmark = pytest.mark.ranks

FAST = [(family, "dp2") for family in FAMILIES]
SLOW = [(family, name) for family in FAMILIES for name in ("dp4", "tp2dp2", "tp2spdp2", "pp2dp2")]
LOADED_IN = ["one", "one+zero", "dp2", "tp2+zero", "pp2+zero"]
LOADED_IN_4 = ["dp4+zero", "tp2dp2+zero", "pp2dp2+zero"]
MOMENTS = {"exp_avg", "exp_avg_sq"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}  # NeMo: overlap_grad_sync, overlap_param_sync
INSTANCES = {"num_distributed_optimizer_instances": 2}


DTYPES = ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("family", "name"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_sharded_equals_unsharded(parity, family, name):
    row = parity.zero_against_unsharded(Recipe.of(family), layout(name), 1e-6)
    assert row.good, row


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_clipping_it_is_the_same_to_the_bit(parity, dtype):
    """Two ranks' gradients add up the same way in a reduce-scatter; only the norm is summed in another order."""
    recipe = Recipe.of("gpt", dtype=dtype, clip=NO_CLIPPING)
    row = parity.zero_against_unsharded(recipe, layout("dp2"), 1e-6)
    assert (row.errors.loss, row.errors.grad, row.errors.copies) == (0.0, 0.0, 0.0), row
    mine, plain = (parity.ours(recipe, replace(layout("dp2"), zero=zero))[0].weights for zero in (True, False))
    assert all(torch.equal(mine[name], plain[name]) for name in plain)


def test_a_mistake_shows(parity):
    row = parity.zero_against_unsharded(Recipe.of("gpt"), layout("dp2"), 1e-6, "one gradient x 1.01")
    assert row.verdict == "red, as it must", row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_holds_its_part_of_the_state(parity, ranks, dtype):
    recipe = Recipe.of("gpt", dtype=dtype)
    [whole] = parity.state_bytes(recipe, layout("one"))
    mine = parity.state_bytes(recipe, layout(f"dp{ranks}+zero"))
    assert max(mine) * ranks <= 1.01 * whole, (mine, whole)
    assert sum(mine) >= whole  # nothing is missing either
    per_parameter = {"float32": 8, "bfloat16": 12}[dtype]
    assert whole == per_parameter * sum(weight.numel() for weight in parity.weights(recipe).values())


@pytest.fixture(scope="module")
def saved(parity, tmp_path_factory) -> dict[str, Any]:
    """By dtype: a run of six steps on two ranks, sharded, and a checkpoint after three of them."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path_factory.mktemp("zero") / dtype
        recipe = Recipe.of("llama", steps=6, dtype=dtype)
        whole = parity.leg(recipe, layout("dp2+zero"), range(6))
        parity.leg(recipe, layout("dp2+zero"), range(3), save=folder)
        found[dtype] = SimpleNamespace(folder=folder, recipe=recipe, whole=whole)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_in_its_own_layout_to_the_bit(parity, saved, dtype):
    run = saved[dtype]
    rest = parity.leg(run.recipe, layout("dp2+zero"), range(3, 6), resume=run.folder)
    assert rest.losses == run.whole.losses[3:]
    assert rest.grad_norms == run.whole.grad_norms[3:]
    assert all(torch.equal(rest.weights[name], run.whole.weights[name]) for name in run.whole.weights)


def train_from_what_would_be_saved(*arguments: Any) -> Any:
    """ours.train, whose loop loads into what the optimizer would save: it never says is_loading.

    Of a parameter that two ranks update one alone has the loaded tensors then, and the other's part comes from it.
    """
    from nxdt_nemo.megatron.optimizer.distrib_optimizer import DistributedOptimizer
    from nxdt_nemo.testing import ours

    given = DistributedOptimizer.sharded_state_dict

    def as_for_saving(self: Any, model: Any, is_loading: bool = False, **others: Any) -> Any:
        return given(self, model, **others)

    with mock.patch.object(DistributedOptimizer, "sharded_state_dict", as_for_saving):
        return ours.train(*arguments)


def resumed_so(parity: Any, gloo: Any, recipe: Recipe, place: Any, steps: range, *files: Any, fault: str = "") -> Any:
    """Parity.leg with it; files: the checkpoint to resume, and one to write."""
    arguments = (recipe, parity.weights(recipe), place, fault, steps, *files)
    ranks = gloo(place.world, train_from_what_would_be_saved, *arguments, init=ACTIVE, env=ACTIVE_ENV)
    return assemble(ranks)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_into_what_would_be_saved(parity, gloo, saved, dtype, tmp_path):
    """To the bit, and written again the same; without the moments it shows."""
    run, place = saved[dtype], layout("dp2+zero")
    rest = resumed_so(parity, gloo, run.recipe, place, range(3, 6), run.folder)
    assert (rest.losses, rest.grad_norms) == (run.whole.losses[3:], run.whole.grad_norms[3:])
    assert all(torch.equal(rest.weights[name], run.whole.weights[name]) for name in run.whole.weights)
    resumed_so(parity, gloo, run.recipe, place, range(0), run.folder, tmp_path / "again")
    found, expected = read_tensors(tmp_path / "again"), read_tensors(run.folder)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    other = resumed_so(parity, gloo, run.recipe, place, range(3, 6), run.folder, fault="moments not resumed")
    assert relative(other.losses, run.whole.losses[3:]) > 1e-3


LOADED_AS_FOR_SAVING_4 = [
    ("llama", "dp4+zero", INSTANCES),
    ("llama", "dp4+zero", OVERLAP),
    ("gpt", "pp2dp2+zero", {}),
    ("mixtral", "ep2dp4+zero", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name", "ddp"), LOADED_AS_FOR_SAVING_4)
def test_loaded_into_what_would_be_saved_on_four_ranks(parity, gloo, tmp_path, family, name, ddp):
    """Two instances of the optimizer, tied embeddings of two stages, and experts' groups beside the others'."""
    recipe, place = recipe_of(family, name, steps=4)
    whole = parity.leg(recipe, place, range(4), **ddp)
    parity.leg(recipe, place, range(2), save=tmp_path / "saved", **ddp)
    rest = resumed_so(parity, gloo, recipe, place, range(2, 4), tmp_path / "saved", None, ddp)
    assert (rest.losses, rest.grad_norms) == (whole.losses[2:], whole.grad_norms[2:])


def steps_of(folder: Path) -> list[int]:
    """What a checkpoint's parameter groups say of it."""
    common = torch.load(folder / "common.pt", weights_only=False)["optimizer"]
    return [group["step"] for group in common.get("optimizer", common)["param_groups"]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_from_before_the_first_step(parity, saved, tmp_path, dtype):
    """Its groups say that none was made, and a run from it is the run from the start."""
    run, place = saved[dtype], layout("dp2+zero")
    parity.leg(run.recipe, place, range(0), save=tmp_path / "start")
    assert set(steps_of(tmp_path / "start")) == {0} and set(steps_of(run.folder)) == {3}
    all_of_it = parity.leg(run.recipe, place, range(6), resume=tmp_path / "start")
    assert (all_of_it.losses, all_of_it.grad_norms) == (run.whole.losses, run.whole.grad_norms)


@pytest.mark.parametrize("name", [*LOADED_IN, *(pytest.param(name, marks=pytest.mark.slow) for name in LOADED_IN_4)])
def test_resumed_in_another_layout(parity, saved, name):
    run = saved["float32"]
    rest = parity.leg(run.recipe, layout(name), range(3, 6), resume=run.folder)
    assert relative(rest.losses, run.whole.losses[3:]) <= 1e-6
    assert relative(rest.grad_norms, run.whole.grad_norms[3:]) <= 1e-6


SAVED_IN = [("llama", "tp2+zero")]
SAVED_IN_4 = [
    ("gpt", "pp2+zero"),
    *((family, name) for family in FAMILIES for name in ("dp4+zero", "tp2spdp2+zero", "pp2dp2+zero")),
]


@pytest.mark.parametrize(
    ("family", "name"), [*SAVED_IN, *(pytest.param(*case, marks=pytest.mark.slow) for case in SAVED_IN_4)]
)
def test_saved_in_another_layout(parity, tmp_path, family, name):
    """A tied embedding's copy on the last stage is not written, and follows the first one's."""
    recipe, home, folder = Recipe.of(family, steps=6), layout(name), tmp_path / "saved"
    whole = parity.leg(recipe, home, range(6))
    parity.leg(recipe, home, range(3), save=folder)
    own = parity.leg(recipe, home, range(3, 6), resume=folder)
    assert (own.losses, own.grad_norms) == (whole.losses[3:], whole.grad_norms[3:])
    for other in ("one", "dp2+zero"):
        rest = parity.leg(recipe, layout(other), range(3, 6), resume=folder)
        assert relative(rest.losses, whole.losses[3:]) <= 1e-6, other
        assert relative(rest.grad_norms, whole.grad_norms[3:]) <= 1e-6, other
    assert ("optimizer.state.exp_avg.output_layer.weight" in read_tensors(folder)) == (family == "llama")


RESHARDED = [("mixtral", "ep2dp2+zero", "dp2+zero")]  # family, saved in, resumed in
RESHARDED_4 = [
    ("gpt", "pp2vpp2+zero", "tp2+zero"),
    ("gpt", "pp2vpp2dp2+zero", "tp2spdp2+zero"),
    ("gpt", "pp2+zero", "one"),  # tied embeddings
    ("gpt", "cp2dp2+zero", "dp4+zero"),
    ("llama", "cp2dp2+zero", "tp2cp2"),
    ("mixtral", "dp2+zero", "ep2dp2+zero"),
    ("mixtral", "ep2dp2+zero", "one+zero"),
    ("mixtral", "ep4dp4+zero", "ep2dp4+zero"),
    ("mixtral", "tp2spep2etp1dp2+zero", "pp2vpp2+zero"),
]


@pytest.mark.parametrize(
    ("family", "home", "other"), [*RESHARDED, *(pytest.param(*case, marks=pytest.mark.slow) for case in RESHARDED_4)]
)
def test_resharded(parity, tmp_path, family, home, other):
    """Pipelines, their chunks, contexts and experts: the run goes on where it was, and no tensor of it is lost."""
    recipe, place = recipe_of(family, home, steps=4)
    there = layout(other)
    whole = parity.leg(recipe, place, range(4))
    parity.leg(recipe, place, range(2), save=tmp_path / "saved")
    rest = parity.leg(recipe, there, range(2, 4), resume=tmp_path / "saved")
    assert relative(rest.losses, whole.losses[2:]) <= 1e-6
    assert relative(rest.grad_norms, whole.grad_norms[2:]) <= 1e-6
    parity.leg(recipe, there, range(0), resume=tmp_path / "saved", save=tmp_path / "again")
    found, expected = (by_plain_name(read_tensors(tmp_path / folder)) for folder in ("again", "saved"))
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_another_number_of_unsharded_optimizers_is_refused(parity, tmp_path):
    """Experts have one of their own with expert parallelism."""
    recipe, place = recipe_of("mixtral", "ep2dp2+zero", steps=4)
    parity.leg(recipe, place, range(0), save=tmp_path / "saved")
    with pytest.raises(
        RankError, match="saved with another expert_model_parallel_size, and the optimizer is not shard"
    ):
        parity.leg(recipe, layout("dp2"), range(0), resume=tmp_path / "saved")


def by_plain_name(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the number of the optimizer, of which there are two with expert parallelism."""
    return {re.sub(r"^chained_\d\.", "", key): tensor for key, tensor in tensors.items()}


def test_resumed_without_its_moments_it_is_another_run(parity, saved):
    """Else the test above says nothing about them."""
    run = saved["float32"]
    rest = parity.leg(run.recipe, layout("one"), range(3, 6), resume=run.folder, fault="moments not resumed")
    assert relative(rest.losses, run.whole.losses[3:]) > 1e-3


def reloaded(recipe: Recipe) -> list[float]:
    """The values of this rank's main parameters, after weights were put into the model."""
    from nxdt_nemo.testing import ours

    place = layout("dp2+zero")
    model = ours._stages(recipe, place, ours._model_parallel(recipe, place, 1))
    _, optimizer = ours._wrap(model, recipe, True, {})
    with torch.no_grad():
        for param in model[0].parameters():
            param.fill_(0.25)
    optimizer.reload_model_params()
    ours.forget_groups()
    return sorted({float(x) for param in optimizer.optimizer.param_groups[0]["params"] for x in param.unique()})


def test_main_parameters_follow_weights_that_come_later(gloo):
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    assert gloo(2, reloaded, Recipe.of("gpt", dtype="bfloat16"), init=ACTIVE, env=ACTIVE_ENV) == [[0.25], [0.25]]


# --- upstream's own reader and writer: stock megatron-core, where this backend is not active --------------


@pytest.fixture(scope="module")
def stock(parity, tmp_path_factory) -> Any:
    """A run of six steps of upstream on one rank, and a checkpoint after three of them."""
    recipe, folder = Recipe.of("llama", steps=6), tmp_path_factory.mktemp("stock") / "saved"
    parity.stock_leg(recipe, range(3), save=folder)
    return SimpleNamespace(folder=folder, recipe=recipe, whole=parity.stock_leg(recipe, range(6)))


@pytest.mark.parametrize("name", ["one", "dp2+zero", *(pytest.param(n, marks=pytest.mark.slow) for n in LOADED_IN_4)])
def test_what_upstream_wrote_is_resumed(parity, stock, name):
    """Its step too, which torch's Adam keeps elsewhere than Apex's: another one shows in the bias correction."""
    rest = parity.leg(stock.recipe, layout(name), range(3, 6), resume=stock.folder)
    assert relative(rest.losses, stock.whole.losses[3:]) <= 1e-6
    assert relative(rest.grad_norms, stock.whole.grad_norms[3:]) <= 1e-6


def test_upstream_resumes_what_was_written_here(parity, saved):
    run = saved["float32"]
    rest = parity.stock_leg(run.recipe, range(3, 6), resume=run.folder)
    assert relative(rest.losses, run.whole.losses[3:]) <= 1e-6
    assert relative(rest.grad_norms, run.whole.grad_norms[3:]) <= 1e-6


# --- megatron-core's other ways to share and to communicate ------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_overlapped_collectives_change_nothing(parity, saved, dtype, tmp_path):
    """Nor the checkpoint, which is written when parameters have not been gathered yet."""
    run, folder = saved[dtype], tmp_path / "overlapped"
    mine = parity.leg(run.recipe, layout("dp2+zero"), range(3), save=folder, **OVERLAP)
    assert (mine.losses, mine.grad_norms) == (run.whole.losses[:3], run.whole.grad_norms[:3])
    found, expected = read_tensors(folder), read_tensors(run.folder)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def buckets_of(recipe: Recipe, size: int) -> int:
    """Buckets of this rank's gradients, at most `size` elements each unless a parameter has more."""
    from nxdt_nemo.testing import ours

    place = layout("dp2+zero")
    try:
        model = ours._stages(recipe, place, ours._model_parallel(recipe, place))
        [_, optimizer] = ours._wrap(model, recipe, True, {"overlap_grad_reduce": True, "bucket_size": size})
        return len(optimizer.chained_optimizers[0].buckets)
    finally:
        ours.forget_groups()


def test_the_size_of_a_bucket_changes_nothing_but_their_number(parity, gloo):
    """megatron-core's bucket_size; in NeMo optim.ddp_bucket_size, or optim.bucket_cap_mb, in bytes."""
    recipe = Recipe.of("gpt", steps=3, clip=NO_CLIPPING)
    sizes, place = (10**9, 30_000), layout("dp2+zero")
    runs = [parity.leg(recipe, place, range(3), overlap_grad_reduce=True, bucket_size=size) for size in sizes]
    one, several = (gloo(2, buckets_of, recipe, size, init=ACTIVE, env=ACTIVE_ENV)[0] for size in sizes)
    assert one == 1 and several > 4
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(runs[0].weights[name], runs[1].weights[name]) for name in runs[0].weights)
    assert relative(runs[1].grad_norms, runs[0].grad_norms) <= 1e-6  # a sum over pieces, which are others


@pytest.mark.slow
def test_two_instances_write_their_state_once(parity, tmp_path):
    """Two pairs of ranks that hold the same state: num_distributed_optimizer_instances=2."""
    recipe, home, folder = Recipe.of("llama", steps=6), layout("dp4+zero"), tmp_path / "instances"
    whole = parity.leg(recipe, home, range(6), **INSTANCES)
    parity.leg(recipe, home, range(3), save=folder, **INSTANCES)
    plain = parity.leg(recipe, home, range(6))
    assert relative(whole.losses, plain.losses) <= 1e-6
    for name, ddp in (("dp4+zero", INSTANCES), ("dp4+zero", {}), ("one", {})):
        rest = parity.leg(recipe, layout(name), range(3, 6), resume=folder, **ddp)
        assert relative(rest.losses, whole.losses[3:]) <= 1e-6
        assert relative(rest.grad_norms, whole.grad_norms[3:]) <= 1e-6


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_files_hold_each_parameters_state_by_name_in_its_shape(parity, saved, dtype):
    """Read by torch alone. The same tensors, to the bit, that upstream's unsharded optimizer writes."""
    run = saved[dtype]
    found = read_tensors(run.folder)
    state = {key: tensor for key, tensor in found.items() if key.startswith("optimizer.state.")}
    names = {"fp32_param", *MOMENTS} if dtype == "bfloat16" else MOMENTS
    weights = parity.weights(run.recipe)
    assert {key.split(".")[2] for key in state} == names
    for name in ("one", "tp2+zero", "pp2+zero"):  # read and written again
        again = run.folder.parent / f"{dtype} in {name}"
        parity.leg(run.recipe, layout(name), range(0), resume=run.folder, save=again)
        expected = read_tensors(again)
        assert found.keys() == expected.keys(), name
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items()), name
    for tensor in state.values():
        assert tensor.dtype == torch.float32
    sizes = sum(tensor.numel() for tensor in state.values())
    assert sizes == len(names) * sum(weight.numel() for weight in weights.values())
    assert all(tensor.dim() > 1 for key, tensor in state.items() if key.endswith("linear_fc2.weight"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_padded_to_another_size(parity, saved, tmp_path, dtype):
    """Rows that the checkpoint has not are zero, as upstream makes them."""
    run = saved[dtype]
    recipe, found = replace(run.recipe, vocab=1152), {}
    for name in ("one", "dp2+zero"):
        parity.leg(recipe, layout(name), range(0), resume=run.folder, save=tmp_path / name)
        found[name] = read_tensors(tmp_path / name)
    assert found["one"].keys() == found["dp2+zero"].keys()
    assert [key for key, tensor in found["one"].items() if not torch.equal(tensor, found["dp2+zero"][key])] == []
    for key in ("output_layer.weight", "optimizer.state.exp_avg.output_layer.weight"):
        assert torch.equal(found["dp2+zero"][key][:1024], read_tensors(run.folder)[key])
        assert not found["dp2+zero"][key][1024:].any()


def test_a_checkpoint_of_another_precision(parity, saved, tmp_path):
    """float32 has no main parameters that bf16 could go on with; the other way they are not read."""
    halves, fulls = saved["bfloat16"], saved["float32"]
    with pytest.raises(RankError, match=r"optimizer\.state\.fp32_param\."):
        parity.leg(halves.recipe, layout("dp2+zero"), range(0), resume=fulls.folder)
    parity.leg(fulls.recipe, layout("dp2+zero"), range(0), resume=halves.folder, save=tmp_path / "full")
    found, expected = read_tensors(tmp_path / "full"), read_tensors(halves.folder)
    weights = [key for key in found if not key.startswith("optimizer.")]
    assert {found[key].dtype for key in weights} == {torch.float32}
    assert all(torch.equal(tensor, expected[key].float()) for key, tensor in found.items())


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_pieces_cover_each_element_once(ranks):
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    from nxdt_nemo.megatron.optimizer.zero import allocate

    shapes = [(7,), (3, 4), (1,), (5, 2, 2), (2,)]
    seen = [torch.zeros(shape).flatten() for shape in shapes]
    for rank in range(ranks):
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        values = [param.detach().clone() for param in params]
        bucket = allocate(params, SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank))
        assert all(torch.equal(param, value) for param, value in zip(params, values, strict=True))
        for param, piece in bucket.pieces.items():
            place = next(i for i, other in enumerate(params) if other is param)
            seen[place][piece.start : piece.stop] += 1
            assert torch.equal(piece.cut(param.detach()), piece.model)
            piece.model.fill_(-1.0)
            assert bool((param.detach().flatten()[piece.start : piece.stop] == -1).all())  # a view, not a copy
    assert all(bool((count == 1).all()) for count in seen)


def test_backward_adds_to_the_buffer_itself():
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    from nxdt_nemo.megatron.optimizer.zero import allocate

    layer = torch.nn.Linear(4, 3)
    bucket = allocate(list(layer.parameters()), SimpleNamespace(size=lambda: 2, rank=lambda: 0))
    for _ in range(2):
        layer(torch.ones(2, 4)).sum().backward()
    assert bucket.grads[:15].tolist() == [4.0] * 15
    assert layer.weight.grad.data_ptr() == bucket.grads.data_ptr()
