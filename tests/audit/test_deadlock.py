"""Ranks that wait for each other: the first place where they part is named."""

from __future__ import annotations

from nxdt_nemo.audit.deadlock import compared, mismatches
from nxdt_nemo.audit.hlo import Collective

TP = ((0, 1), (2, 3))
DP = ((0, 2), (1, 3))


def of(kind: str, groups: tuple[tuple[int, ...], ...], whole: int = 64, how: str = "") -> Collective:
    return Collective(kind, "f32", groups, whole, how)


def test_ranks_of_different_stages_share_what_both_are_in_only() -> None:
    one = [of("all-reduce", TP), of("all-gather", ((0, 2), (1, 3))), of("all-reduce", TP)]
    other = [of("all-gather", DP)]
    assert not [*mismatches({0: one, 2: other}, {0: 0, 2: 1})]


def test_another_order_is_named_with_both_sides() -> None:
    one, other = [of("all-gather", TP), of("reduce-scatter", TP)], [of("reduce-scatter", TP), of("all-gather", TP)]
    [found] = mismatches({0: one, 1: other})
    assert "collective 1 " in str(found) and "rank 0 has all-gather" in str(found)
    assert "rank 1 has reduce-scatter" in str(found)


def test_groups_that_do_not_match_and_sizes_that_differ() -> None:
    [found] = mismatches({0: [of("all-reduce", ((0, 1, 2, 3),))], 1: [of("all-reduce", TP)]})
    assert "ranks 0,1,2,3" in str(found) and "ranks 0,1," not in str(found).replace("ranks 0,1,2,3", "")
    [found] = mismatches({0: [of("all-reduce", TP, 64)], 1: [of("all-reduce", TP, 32)]})
    assert "64 bytes" in str(found) and "32 bytes" in str(found)


def test_one_that_is_missing_at_the_end() -> None:
    [found] = mismatches({2: [of("all-reduce", TP)], 3: []})
    assert "rank 3 has none" in str(found)


def test_a_circle_of_ranks_of_which_each_pair_agrees() -> None:
    """0 waits for 1, which waits for 2, which waits for 0."""
    zero_one, zero_two, one_two = (of("all-gather", (pair,)) for pair in ((0, 1), (0, 2), (1, 2)))
    order = {0: [zero_one, zero_two], 1: [one_two, zero_one], 2: [zero_two, one_two]}
    [found] = mismatches(order)
    assert "circle: rank 0 for all-gather of 64 bytes of f32 over ranks 0,1, rank 1 for" in str(found)
    assert not [*mismatches(order | {1: [zero_one, one_two]})]


def test_pairs_that_have_something_to_compare_are_counted() -> None:
    both, stages = [of("all-reduce", TP)], [of("all-gather", ((0, 3), (1, 2)))]
    assert compared({0: both}) == compared({0: both, 2: both}) == 0
    assert compared({0: both + stages, 1: both, 3: []}) == 2


def test_another_reduction_and_another_dimension_are_named() -> None:
    [found] = mismatches({0: [of("all-reduce", TP, how="add")], 1: [of("all-reduce", TP, how="maximum")]})
    assert "rank 0 has all-reduce (add) of" in str(found) and "rank 1 has all-reduce (maximum) of" in str(found)
    [found] = mismatches({0: [of("all-gather", TP, how="dim 0")], 1: [of("all-gather", TP, how="dim 1")]})
    assert "all-gather (dim 0)" in str(found) and "all-gather (dim 1)" in str(found)


def test_groups_that_contradict_each_other_are_named_though_the_lowered_ranks_share_none() -> None:
    crossed = ((0, 3), (1, 2))
    [found] = mismatches({0: [of("all-reduce", DP)], 1: [of("all-reduce", crossed)]})
    words = "by the program of rank 0, rank 1 has all-reduce of 64 bytes of f32 over ranks 1,3; it has none there"
    assert str(found) == words
    [found] = mismatches({0: [of("all-reduce", TP)], 3: [of("all-gather", DP), of("all-reduce", DP)]})
    assert "by the program of rank 0, rank 3 has all-reduce of 64 bytes of f32 over ranks 2,3" in str(found)
    assert not [*mismatches({0: [of("all-reduce", DP)], 1: [of("all-reduce", DP[::-1])]})]


def test_groups_that_stand_for_none_are_no_promise() -> None:
    """A transfer from rank 3 to 0: their programs have the others in a pair, whose own programs have nothing."""
    assert not [*mismatches({0: [of("all-gather", ((0, 3), (1, 2)))], 1: []})]


def test_rings_of_the_whole_world_are_rings_of_their_own() -> None:
    """Of context parallelism in two stages, which send each other something besides."""
    rings, between = of("collective-permute", ((0, 1), (1, 0), (2, 3), (3, 2))), of("all-gather", DP)
    assert not [*mismatches({0: [rings, between], 2: [between, rings]}, {0: 0, 2: 1})]
    [found] = mismatches({0: [rings, of("all-reduce", TP)], 1: [of("all-reduce", TP), rings]})
    assert "rank 0 has collective-permute of 64 bytes of f32 over ranks 0,1, rank 1 has all-reduce" in str(found)


def test_a_program_may_leave_ranks_out_that_it_does_not_know() -> None:
    own, others = ((0, 1), (2,), (3,)), ((2, 3), (0,), (1,))
    assert not [*mismatches({0: [of("all-reduce", own)], 2: [of("all-reduce", others)]})]


def test_stages_name_pairs_of_their_own() -> None:
    """The second stage receives on the list that the third sends on."""
    even, odd = ((0, 1), (2, 3)), ((1, 2), (3, 0))
    order = {1: [of("all-gather", even), of("all-gather", odd)], 2: [of("all-gather", odd), of("all-gather", even)]}
    assert not [*mismatches(order, {1: 1, 2: 2})]
