"""Small steps for large ones: which are lowered, and lines through them."""

from __future__ import annotations

import pytest

from nxdt_nemo.audit.points import points


def test_a_large_model_is_lowered_in_four_small_steps() -> None:
    model = {"num_layers": 80, "pipeline_model_parallel_size": 8}
    found = points(model, 512)
    assert found.all == ((1, 1), (1, 10), (2, 1), (2, 10)) and found.wanted == (10, 512)
    assert points({"num_layers": 32}, 512).all == ((1, 1), (1, 3), (2, 1), (2, 3))


def test_what_is_in_line_comes_out_exactly() -> None:
    found = points({"num_layers": 32}, 512)
    assert (
        found.value(lambda at: 3 + 5 * at[0] + 7 * at[1] + 11 * at[0] * at[1]) == 3 + 5 * 32 + 7 * 512 + 11 * 32 * 512
    )
    assert found.at_full_pipeline(lambda at: 100 * at[0] + at[1]) == 3200 + 3


def test_interleaved_pipelines_run_whole_rounds() -> None:
    model = {"num_layers": 32, "pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    assert points(model, 64).micro == (4, 8) and points(model, 64).wanted == (4, 64)


@pytest.mark.parametrize(
    "said",
    [
        {"activations_checkpoint_method": "block", "activations_checkpoint_num_layers": 1},
        {"activations_checkpoint_method": "uniform", "activations_checkpoint_num_layers": 4},
        {"moe_layer_freq": 2},
        {"account_for_loss_in_pipeline_split": True},
        {"num_layers": 33, "pipeline_model_parallel_size": 2},
    ],
)
def test_layers_that_differ_are_all_lowered(said: dict[str, object]) -> None:
    found = points({"num_layers": 32} | said, 512)
    assert found.layers == (found.wanted[0],)


def test_the_whole_is_the_whole() -> None:
    assert points({"num_layers": 32}, 512, whole=True).all == ((32, 512),)
    assert points({"num_layers": 2}, 2).all == ((2, 2),)
