"""Gram products against HSIC_1 as the paper writes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdprobe.errors import ConfigError
from tdprobe.stats import Cross, Gram, gram, gram_products


def layers_of(n, widths, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    rows = []
    for d in widths:
        mixed = latent @ torch.randn(3, d, generator=generator, dtype=torch.float64)
        rows.append((mixed + torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype))
    return rows


def hsic_1(x, y):
    """Song et al. 2012, eq. 5, with explicit zero-diagonal Grams of the rows as they are."""
    p, q, n = x @ x.T, y @ y.T, len(x)
    np.fill_diagonal(p, 0)
    np.fill_diagonal(q, 0)
    one = np.ones(n)
    trace = np.trace(p @ q) + (one @ p @ one) * (one @ q @ one) / ((n - 1) * (n - 2))
    return (trace - 2 / (n - 2) * (one @ p @ q @ one)) / (n * (n - 3))


def hsic_0(x, y):
    n = len(x)
    h = np.eye(n) - 1 / n
    return np.trace((x @ x.T) @ h @ (y @ y.T) @ h)


def reference(rows, unbiased):
    arrays = [x.double().numpy() for x in rows]
    kernel = hsic_1 if unbiased else hsic_0
    return np.array([[kernel(x.copy(), y.copy()) for y in arrays] for x in arrays])


def run(statistic, batches):
    ids = torch.arange(len(batches[0][0]))
    state = statistic.init(batches[0], ids)
    for rows in batches:
        state = statistic.update(state, rows, torch.arange(len(rows[0])))
    return state


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n", [4, 5, 33, 150])
def test_products_equal_the_definition(n, unbiased):
    rows = layers_of(n, [2, 7, 40], seed=n)
    expected = reference(rows, unbiased)
    np.testing.assert_allclose(gram_products(rows, unbiased), expected, rtol=1e-9, atol=1e-9 * abs(expected).max())


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
def test_float32_holds_at_an_offset(offset, unbiased):
    rows = [x + offset for x in layers_of(300, [5, 64, 400], dtype=torch.float32)]
    # The reference sees the rounded rows, centred in float64 so that its own sums stay exact.
    expected = reference([x.double() - x.double().mean(0) for x in rows], unbiased)
    np.testing.assert_allclose(gram_products(rows, unbiased), expected, rtol=1e-4)


def test_the_mean_is_taken_out_to_the_last_digit():
    # One pass would leave the rounding of a float32 mean near 1e6, up to 0.03, in every row.
    rows = [x + 1e6 for x in layers_of(300, [6, 32], dtype=torch.float32)]
    expected = reference([x.double() - x.double().mean(0) for x in rows], True)
    np.testing.assert_allclose(gram_products(rows), expected, rtol=1e-5)
    ids = torch.arange(300)
    crossed = Cross(True).update(Cross(True).init(rows, ids), rows, ids)
    np.testing.assert_allclose(crossed.hsic, expected, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 70), st.sampled_from([1, 3, 16, 64]), st.sampled_from([1, 2000, 10**6]), st.booleans())
def test_tiles_do_not_change_the_products(n, block, budget, unbiased):
    rows = layers_of(n, [3, 9], seed=n)
    whole = gram_products(rows, unbiased)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "BLOCK", block)
        patch.setattr(gram, "BUDGET", budget)
        torch.testing.assert_close(gram_products(rows, unbiased), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e8])
def test_products_scale_with_the_fourth_power_of_float32_rows(scale):
    rows = layers_of(60, [8, 8], dtype=torch.float32)
    scaled = gram_products([x * scale for x in rows])
    torch.testing.assert_close(scaled / scale**4, gram_products(rows), rtol=1e-4, atol=0)


def test_views_integers_and_half_precision_are_taken_as_they_are():
    wide = torch.arange(240).reshape(20, 12) % 7
    rows = [wide[:, ::2], wide.to(torch.float16)[:, 3:], wide.to(torch.bfloat16).T.contiguous().T]
    np.testing.assert_allclose(gram_products(rows), reference(rows, True), rtol=1e-5)


def test_a_layer_with_nan_spoils_its_own_pairs_only():
    rows = layers_of(40, [3, 4, 5])
    clean = gram_products(rows)
    rows[1][7, 2] = torch.nan
    products = gram_products(rows)
    assert products[1].isnan().all() and products[:, 1].isnan().all()
    keep = [0, 2]
    torch.testing.assert_close(products[keep][:, keep], clean[keep][:, keep])


def test_every_update_adds_the_product_of_its_own_rows_for_each_row():
    sizes = (9, 5, 30)
    batches = [layers_of(n, [4, 6], seed=n) for n in sizes]
    state = run(Gram(), batches)
    expected = sum(n * reference(rows, True) for n, rows in zip(sizes, batches, strict=True))
    np.testing.assert_allclose(state.hsic, expected, rtol=1e-9)
    assert (int(state.n), int(state.batches)) == (44, 3)


def test_merge_of_shards_is_the_stream_in_any_grouping():
    parts = [run(Gram(False), [layers_of(n, [4, 6], seed=n)]) for n in (9, 5, 30)]
    a, b, c = parts
    streamed = run(Gram(False), [layers_of(n, [4, 6], seed=n) for n in (9, 5, 30)])
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        for name in ("n", "batches", "hsic", "spread", "power"):
            torch.testing.assert_close(getattr(merged, name), getattr(streamed, name), rtol=1e-12, atol=0)


def test_update_leaves_state_and_rows_as_they_were():
    rows = layers_of(20, [4, 6])
    copies = [x.clone() for x in rows]
    state = run(Gram(), [rows])
    before = state.hsic.clone()
    run_on = Gram().update(state, rows, torch.arange(20))
    assert torch.equal(state.hsic, before) and all(map(torch.equal, rows, copies))
    torch.testing.assert_close(run_on.hsic, 2 * before)


def test_leading_dimensions_are_data_sets_of_their_own():
    sets = [layers_of(15, [4, 6], seed=seed) for seed in range(6)]
    stacked = [torch.stack(layer).unflatten(0, (2, 3)) for layer in zip(*sets, strict=True)]
    ids = torch.arange(15)
    state = Gram().update(Gram().init(stacked, ids), stacked, ids)
    for index, rows in enumerate(sets):
        torch.testing.assert_close(state.hsic[index // 3, index % 3], 15 * gram_products(rows))


def test_an_update_without_rows_adds_nothing():
    state = run(Gram(), [layers_of(20, [4, 6])])
    after = Gram().update(state, [torch.zeros(0, 4), torch.zeros(0, 6)], torch.arange(0))
    assert torch.equal(after.hsic, state.hsic) and int(after.batches) == 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_too_few_rows_are_refused(n):
    with pytest.raises(ConfigError, match=f"got {n} rows.*at least 4"):
        gram_products([torch.zeros(n, 2)])


def test_layers_that_do_not_fit_are_refused():
    state = run(Gram(), [layers_of(20, [4, 6])])
    with pytest.raises(ConfigError, match=r"layer 1 .*\(5,\).*\(6,\)"):
        Gram().update(state, layers_of(20, [4, 5]), torch.arange(20))
    with pytest.raises(ConfigError, match="1 layers, the state has 2"):
        Gram().update(state, layers_of(20, [4]), torch.arange(20))
    with pytest.raises(ConfigError, match=r"\[4, 6\] and \[4, 5\]"):
        state.merge(run(Gram(), [layers_of(20, [4, 5])]))
    with pytest.raises(ConfigError, match="complex"):
        gram_products([torch.zeros(5, 2, dtype=torch.complex64)])
    with pytest.raises(ConfigError, match="no layers"):
        Gram().init([], torch.arange(0))
