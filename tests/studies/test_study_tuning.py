"""Choices on validation images: ties go to the middle, grids grow until the best is inside."""

from __future__ import annotations

import pytest

from studies.paper.tuning import MOST_WIDENINGS, choose


def _chosen(scores: dict[float, float], grid: list[float], **options):
    """Scores of values that are not given are 0."""
    return choose(grid, lambda value: (scores.get(value, 0.0), f"made with {value:g}"), **options)


def test_the_best_inside_is_chosen_with_what_was_made() -> None:
    choice = _chosen({1.0: 0.5, 10.0: 0.9, 100.0: 0.7}, [1.0, 10.0, 100.0])
    assert (choice.value, choice.result) == (10.0, "made with 10")
    assert choice.tried == {1.0: 0.5, 10.0: 0.9, 100.0: 0.7}


@pytest.mark.parametrize("ends", [(1.0, 0.1, 0.01), (100.0, 1000.0, 10000.0)])
def test_the_grid_grows_at_the_end_that_is_best(ends) -> None:
    scores = dict(zip(ends, (0.5, 0.6, 0.4), strict=True))
    choice = _chosen(scores, [1.0, 10.0, 100.0])
    assert choice.value == ends[1]
    assert set(choice.tried) == {1.0, 10.0, 100.0, *ends}
    assert list(choice.tried) == sorted(choice.tried)


def test_growth_ends() -> None:
    choice = choose([1.0, 2.0, 4.0], lambda value: (value, value))
    assert choice.value == 4.0 * 2**MOST_WIDENINGS
    assert len(choice.tried) == 3 + MOST_WIDENINGS
    assert choice.told()["chosen"] == choice.told()["tried"][-1][0] == choice.value


def test_of_several_best_the_middle_one_is_taken() -> None:
    flat = _chosen(dict.fromkeys([1.0, 2.0, 4.0], 0.5), [1.0, 2.0, 4.0])
    assert flat.value == 2.0
    assert len(flat.tried) == 3  # a plateau is no reason to go on
    two = _chosen({1.0: 0.1, 2.0: 0.5, 4.0: 0.5, 8.0: 0.1}, [1.0, 2.0, 4.0])
    assert two.value == 4.0
    assert 8.0 in two.tried


def test_whole_numbers_are_continued_by_whole_numbers_up_to_the_limit() -> None:
    choice = choose([16, 32, 64], lambda value: (value, None), limits=(4, 128))
    assert choice.value == 128 and isinstance(choice.value, int)
    down = choose([16, 48], lambda value: (-value, None), limits=(4, 128))
    assert list(down.tried) == [5, 16, 48]  # 5.33; then 1.56, which is below the limit
    # Below 1 there are no whole numbers: a rate may be written 1.
    assert choose([1, 10], lambda value: (-value, None)).value == 0.001


def test_limits_end_a_grid() -> None:
    choice = choose([0.1, 0.3, 0.9], lambda value: (value, None), limits=(0.0, 1.0))
    assert choice.value == 0.9 and len(choice.tried) == 3
