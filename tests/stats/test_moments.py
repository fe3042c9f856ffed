"""Moments against numpy, whatever the batches were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdprobe.errors import ConfigError
from tdprobe.stats import Moments


def feed(batches):
    state = Moments().init(batches[0], torch.arange(0))
    for rows in batches:
        state = Moments().update(state, rows, torch.arange(rows[0].shape[-2]))
    return state


def split(rows, sizes):
    return [list(part) for part in zip(*(x.split(sizes, -2) for x in rows), strict=True)]


def layers_of(n, widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64).cumsum(0) for d in widths]


def check(state, rows):
    for index, x in enumerate(rows):
        np.testing.assert_allclose(state.mu[str(index)], x.double().numpy().mean(0), rtol=1e-9, atol=1e-9)
        expected = np.cov(x.double().numpy().T, bias=True) * len(x)
        np.testing.assert_allclose(state.scatters[str(index)], np.atleast_2d(expected), rtol=1e-9, atol=1e-9 * len(x))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1),
    st.integers(0, 99),
)
def test_any_split_gives_the_moments_of_all_rows(sizes, seed):
    rows = layers_of(sum(sizes), [1, 3, 5], seed)
    state = feed(split(rows, sizes))
    assert int(state.n) == sum(sizes)
    check(state, rows)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(lambda sizes: sum(sizes) > 1),
    st.integers(0, 99),
)
def test_merge_is_associative_and_commutative(sizes, seed):
    rows = layers_of(sum(sizes), [2, 4], seed)
    a, b, c = (feed([part]) for part in split(rows, sizes))
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(b).merge(a)):
        check(merged, rows)


def test_float32_rows_at_an_offset_keep_their_scatter():
    x = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)) + 1000
    state = feed(split([x], [700, 300, 1000]))
    expected = np.cov(x.double().numpy().T, bias=True) * 2000
    np.testing.assert_allclose(state.scatters["0"], expected, rtol=1e-4, atol=1e-4 * 2000)


def test_few_rows_before_many_keep_their_weight():
    # Of numbers 3 and 100,000 times 0 the scatter is 9 * 100,000 / 100,001.
    state = feed([[torch.full((1, 1), 3.0)], [torch.zeros(100_000, 1)]])
    assert float(state.scatters["0"]) == pytest.approx(900_000 / 100_001, rel=1e-14)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_layer_without_columns_leaves_the_others_alone(lead):
    rows = [torch.zeros(*lead, 6, 0), torch.arange(12.0).reshape(6, 2).expand(*lead, 6, 2)]
    state = feed(split(rows, [2, 4]))
    assert state.scatters["0"].shape == (*lead, 0, 0)
    assert bool((state.scatters["1"] == 70).all()) and bool((state.mu["1"] == torch.tensor([5.0, 6.0])).all())


def test_leading_dimensions_and_more_than_ten_layers_keep_their_places():
    sets = [layers_of(9, range(1, 13), seed) for seed in range(2)]
    stacked = [torch.stack(layer) for layer in zip(*sets, strict=True)]
    state = feed(split(stacked, [4, 5]))
    for which, rows in enumerate(sets):
        for index, x in enumerate(rows):
            np.testing.assert_allclose(state.mu[str(index)][which], x.mean(0), rtol=1e-9, atol=1e-12)


def test_state_survives_a_state_dict(tmp_path):
    rows = layers_of(9, range(1, 13))
    state = feed([rows])
    restored = feed([[x[:0] for x in rows]])
    restored.load_state_dict(state.state_dict())
    check(restored.merge(feed([rows])), [torch.cat([x, x]) for x in rows])


def test_other_layers_are_refused():
    state = feed([layers_of(5, [2, 3])])
    with pytest.raises(ConfigError, match=r"layer 1 .*\(4,\).*\(3,\)"):
        state.merge(feed([layers_of(5, [2, 4])]))
