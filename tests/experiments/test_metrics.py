"""Metrics of texts against numbers worked out by hand."""

import math

import pytest

from airjax.experiments import metrics


def test_perplexity():
    assert metrics.perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4)
    assert metrics.perplexity([]) is None


def test_distinct_counts_over_all_texts():
    assert metrics.distinct([[1, 2, 1, 2]], 1) == 0.5
    assert metrics.distinct([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
    assert metrics.distinct([[1, 2], [1, 2]], 2) == 0.5
    assert metrics.distinct([[1], []], 2) is None


def test_repetition_is_the_share_of_n_grams_that_came_before():
    assert metrics.repetition([1, 2, 3, 4, 5, 6]) == 0
    assert metrics.repetition([7] * 10) == pytest.approx(6 / 7)
    assert metrics.repetition([1, 2, 3]) is None


def test_bleu_by_hand():
    # One-grams: 3 of 4 match; two-grams: (2 + 1) / (3 + 1).
    assert metrics.bleu([1, 2, 3, 9], [[1, 2, 3, 4]], n=2) == pytest.approx(math.sqrt(0.75 * 0.75))
    # A text of 2 tokens beside one of 4 is shorter by e^(1 - 4 / 2).
    assert metrics.bleu([1, 2], [[1, 2, 3, 4]], n=1) == pytest.approx(math.exp(-1))
    # A token counts as often as in the reference that has it most.
    assert metrics.bleu([5, 5, 5, 5], [[5, 6, 7, 8], [5, 5, 7, 8]], n=1) == 0.5


def test_self_bleu_is_one_for_equal_texts_and_zero_for_texts_that_share_nothing():
    assert metrics.self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)
    assert metrics.self_bleu([[1, 2, 3, 4], [5, 6, 7, 8]]) == 0
    assert metrics.self_bleu([[1, 2, 3], []]) is None


def test_the_mean_leaves_out_what_is_not_there():
    assert metrics.mean([1.0, None, 3.0]) == 2
    assert metrics.mean([None]) is None
