"""The Triton row kernels one by one; what is checked is in tests/row_checks.py."""

from __future__ import annotations

import pytest
import row_checks
import to_go_checks

from distil_kernels.backends import triton


# 1: everything is 0; 7: most of a block is outside; 131: odd, so rows begin at odd addresses.
@pytest.mark.parametrize("kind", ["ordinary", "peaked", "near", "offset"])
@pytest.mark.parametrize("vocab_size", [1, 7, 131])
def test_statistics_and_gradient(vocab_size, kind, generator):
    row_checks.check_kinds(triton, vocab_size, kind, generator)


@pytest.mark.parametrize("kind", ["ordinary", "peaked", "near"])
@pytest.mark.parametrize("cost", ["reverse_kl", "jsd", "entropy"])
def test_other_costs(cost, kind, generator):
    row_checks.check_kinds(triton, 131, kind, generator, cost=cost)


def test_softcap_and_minus_infinity(generator):
    row_checks.check_softcap_and_minus_infinity(triton, generator)


def test_equal_models(generator):
    row_checks.check_equal_models(triton, generator)


def test_blocks_of_a_row_meet(generator):
    row_checks.check_blocks(triton, generator)


def test_first_of_equal_maxima_counts():
    row_checks.check_first_of_equal_maxima(triton)


def test_unused_rows_are_zero_and_nan_stays_in_its_row(generator):
    row_checks.check_unused_rows_and_nan(triton, generator)


def test_a_token_outside_the_vocabulary_is_nan(generator):
    row_checks.check_tokens_outside(triton, generator)


def test_cost_to_go(generator):
    to_go_checks.check_random_layouts(triton, generator, 64)
    to_go_checks.check_long_sequences(triton, generator)


def test_no_rows():
    row_checks.check_no_rows(triton)
