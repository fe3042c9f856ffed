"""Cross products: what streams past in any batches equals the definition over all rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdprobe.errors import ConfigError
from tdprobe.stats import Cross, Moments
from tdprobe.stats.cross import TILE
from tdprobe.stats.strips import STRIP

FIELDS = ("n", "mu", "cross", "cubic", "quartic")


def layers_of(n, widths, seed=0):
    """Make rows whose mean drifts, so that batches differ in their means."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(n, 1, generator=generator, dtype=torch.float64).cumsum(0)
    return [drift + torch.randn(n, d, generator=generator, dtype=torch.float64) for d in widths]


def feed(statistic, batches):
    state = statistic.init(batches[0], torch.arange(0))
    for rows in batches:
        state = statistic.update(state, rows, torch.arange(rows[0].shape[-2]))
    return state


def split(rows, sizes):
    return [list(part) for part in zip(*(x.split(sizes, -2) for x in rows), strict=True)]


def u_centred(x):
    """U-centre the Gram (Szekely and Rizzo 2014): another road to HSIC_1 than the one of the code."""
    n = len(x)
    k = x @ x.T
    np.fill_diagonal(k, 0)
    sums = k.sum(0)
    u = k - sums[:, None] / (n - 2) - sums[None] / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(u, 0)
    return u


def reference(rows, unbiased):
    n = len(rows[0])
    centred = [x.double().numpy() - x.double().numpy().mean(0) for x in rows]
    if unbiased:
        grams = [u_centred(x) for x in centred]
        return np.array([[(a * b).sum() / (n * (n - 3)) for b in grams] for a in grams])
    return np.array([[((a.T @ b) ** 2).sum() for b in centred] for a in centred])


def check(state, rows, unbiased, rtol=1e-9):
    expected = reference(rows, unbiased)
    np.testing.assert_allclose(state.hsic, expected, rtol=rtol, atol=rtol * abs(expected).max())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_split_gives_the_value_of_all_rows(sizes, unbiased, seed):
    rows = layers_of(sum(sizes), [1, 3, 8], seed)
    state = feed(Cross(unbiased), split(rows, sizes))
    check(state, rows, unbiased)
    centred = [x - x.mean(0) for x in rows]
    spread = torch.stack([x.square().sum() for x in centred])
    torch.testing.assert_close(state.spread, spread, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.power, torch.stack([x.square().sum() for x in rows]), rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(lambda sizes: sum(sizes) > 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_merge_is_associative_and_commutative(sizes, unbiased, seed):
    rows = layers_of(sum(sizes), [2, 4], seed)
    a, b, c = (feed(Cross(unbiased), [part]) for part in split(rows, sizes))
    whole = feed(Cross(unbiased), [rows])
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(b).merge(a)):
        check(merged, rows, unbiased)
        for name in FIELDS:
            size = float(whole.quartic.abs().sum() + whole.spread.sum())
            torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-9, atol=1e-9 * size)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
def test_float32_holds_at_an_offset_that_changes_between_batches(offset, unbiased):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(600, 2, generator=generator)
    rows = [torch.cat([common, torch.randn(600, d, generator=generator)], 1) + offset for d in (4, 30)]
    check(feed(Cross(unbiased), split(rows, [100, 200, 300])), rows, unbiased, rtol=1e-4)
    moved = [x + torch.arange(600).ge(300).unsqueeze(1) * 3 for x in rows]
    check(feed(Cross(unbiased), split(moved, [300, 300])), moved, unbiased, rtol=1e-4)


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("unbiased", [True, False])
def test_many_rows_and_wide_layers_give_the_value_of_all_rows(unbiased, lead):
    # More rows than are centred at a time, and more columns than are multiplied at a time; the last parts are short.
    n, widths = 2 * TILE + 100, [3, STRIP, STRIP + 2, 2 * STRIP + 44]
    sets = [layers_of(n, widths, seed) for seed in range(max(lead, default=1))]
    rows = [torch.stack(layer).reshape(*lead, n, -1) for layer in zip(*sets, strict=True)]
    state = feed(Cross(unbiased), split(rows, [100, n - 100]))
    centred = [x - x.mean(-2, keepdim=True) for x in rows]
    for i, x in enumerate(centred):
        for j, y in enumerate(centred):
            size = float((x.mT @ x).abs().max() * (y.mT @ y).abs().max()) ** 0.5
            torch.testing.assert_close(state.block(i, j), x.mT @ y, rtol=1e-9, atol=1e-11 * size)
    torch.testing.assert_close(torch.cat([*state.mu.values()], -1), torch.cat(rows, -1).mean(-2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_holds_over_many_rows_and_wide_layers(offset):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(TILE + 500, 2, generator=generator)
    drift = torch.arange(TILE + 500).ge(TILE).unsqueeze(1) * 3
    rows = [torch.cat([common, torch.randn(len(common), d, generator=generator)], 1) + offset for d in (30, STRIP)]
    for moved in (rows, [x + drift for x in rows]):
        check(feed(Cross(), [moved]), moved, False, rtol=1e-4)


@pytest.mark.parametrize("unbiased", [True, False])
def test_leading_dimensions_are_data_sets_of_their_own(unbiased):
    sets = [layers_of(15, [4, 6], seed) for seed in range(6)]
    stacked = [torch.stack(layer).unflatten(0, (2, 3)) for layer in zip(*sets, strict=True)]
    state = feed(Cross(unbiased), split(stacked, [6, 9]))
    for index, rows in enumerate(sets):
        np.testing.assert_allclose(state.hsic[index // 3, index % 3], reference(rows, unbiased), rtol=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(("n", "width"), [(20, 6), (TILE + 20, 6), (TILE + 20, STRIP + 6)])
def test_update_leaves_state_and_rows_as_they_were(n, width, unbiased):
    rows = layers_of(n, [4, width])
    copies = [x.clone() for x in rows]
    state = feed(Cross(unbiased), [rows])
    before = state.clone()
    Cross(unbiased).update(state, [x + 5 for x in rows], torch.arange(n))
    assert all(map(torch.equal, rows, copies))
    assert all((getattr(state, name) == getattr(before, name)).all() for name in FIELDS)


@pytest.mark.parametrize("unbiased", [True, False])
def test_nbytes_is_what_a_state_holds(unbiased):
    state = feed(Cross(unbiased), [[torch.randn(3, 2, 7, d) for d in (3, 5, 11)]])
    held = sum(x.numel() * x.element_size() for x in state.values(include_nested=True, leaves_only=True))
    assert Cross(unbiased).nbytes([3, 5, 11], data_sets=6) == held


def test_a_biased_and_an_unbiased_state_do_not_merge():
    rows = layers_of(9, [2, 3])
    with pytest.raises(ConfigError, match="biased"):
        feed(Cross(True), [rows]).merge(feed(Cross(False), [rows]))
    with pytest.raises(ConfigError, match=r"layer 1 .*\(4,\).*\(3,\)"):
        feed(Cross(), [rows]).merge(feed(Cross(), [layers_of(9, [2, 4])]))


def test_too_few_rows_for_the_unbiased_value_are_refused_when_it_is_asked_for():
    rows = layers_of(5, [2, 3])
    state = feed(Cross(True), [[x[:3] for x in rows]])
    with pytest.raises(ConfigError, match=r"got 3 rows.*at least 4"):
        _ = state.hsic
    check(Cross(True).update(state, [x[3:] for x in rows], torch.arange(2)), rows, True)


def test_an_unbiased_state_serves_a_biased_stream():
    rows = layers_of(30, [2, 3, 8])
    first, second = split(rows, [12, 18])
    wide = feed(Cross(True), [first])
    check(wide.plain, first, False)
    # Whoever asks for less than the state keeps, goes on without spoiling it.
    on = Cross().update(wide, second, torch.arange(18))
    check(on, rows, True)
    check(on.plain.merge(feed(Cross(), [rows])), [torch.cat([x, x]) for x in rows], False)


@pytest.mark.parametrize(
    ("one", "other", "covers"),
    [
        (Cross(True), Cross(), True),
        (Cross(), Cross(), True),
        (Cross(True, sketch=4, seed=2), Cross(sketch=4, seed=2), True),
        (Cross(), Cross(True), False),
        (Cross(True, sketch=4), Cross(), False),
        (Cross(True), Cross(sketch=4), False),
        (Cross(True, sketch=4), Cross(sketch=4, seed=1), False),
        (Cross(), Moments(), False),
        (Moments(), Moments(), True),
    ],
)
def test_a_statistic_covers_what_keeps_no_more(one, other, covers):
    assert one.covers(other) is covers


@pytest.mark.parametrize("unbiased", [False, True])
def test_a_sketch_of_several_data_sets_is_that_of_each(unbiased):
    x = [torch.randn(2, 20, width, generator=torch.Generator().manual_seed(width)).double() for width in (9, 7)]
    statistic, ids = Cross(unbiased, sketch=4), torch.arange(20)
    both = statistic.update(statistic.init(x, ids), x, ids)
    for index in range(2):
        rows = [part[index] for part in x]
        alone = statistic.update(statistic.init(rows, ids), rows, ids)
        torch.testing.assert_close(both.cross["0-1"][index], alone.cross["0-1"])
        torch.testing.assert_close(both.hsic[index], alone.hsic)
