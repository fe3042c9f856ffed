"""The sample depends on ids alone: bitwise the same in any order, split or grouping."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdprobe.errors import ConfigError
from tdprobe.stats import Reservoir


def rows_of(ids):
    """Make rows that are a function of the id, as rows of one sample are."""
    return [torch.stack([ids.double(), ids.double() ** 2], -1), ids.to(torch.bfloat16).unsqueeze(-1)]


def feed(reservoir, batches):
    state = reservoir.init(rows_of(batches[0]), batches[0])
    for ids in batches:
        state = reservoir.update(state, rows_of(ids), ids)
    return state


def check_same(a, b):
    assert torch.equal(a.ids, b.ids)
    assert all(torch.equal(a.rows[key], b.rows[key]) for key in ("0", "1"))


ids_lists = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40)


@settings(max_examples=60, deadline=None)
@given(ids_lists, st.integers(1, 12), st.randoms(use_true_random=False), st.lists(st.integers(0, 40), max_size=4))
def test_order_and_split_do_not_matter(values, size, random, cuts):
    whole = feed(Reservoir(size), [torch.tensor(values, dtype=torch.int64)])
    shuffled = random.sample(values, len(values))
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    parts = [torch.tensor(shuffled[a:b], dtype=torch.int64) for a, b in itertools.pairwise(edges)]
    streamed = feed(Reservoir(size), parts)
    check_same(streamed, whole)
    assert int(whole.n) == min(size, len(set(values))) and int(streamed.n_seen) == len(values)
    assert all(torch.equal(whole.rows[str(i)], x) for i, x in enumerate(rows_of(whole.ids)))


@settings(max_examples=60, deadline=None)
@given(ids_lists, ids_lists, ids_lists, st.integers(1, 12))
def test_merge_is_exact_in_any_grouping(a, b, c, size):
    x, y, z = (feed(Reservoir(size), [torch.tensor(ids, dtype=torch.int64)]) for ids in (a, b, c))
    whole = feed(Reservoir(size), [torch.tensor(a + b + c, dtype=torch.int64)])
    for merged in (x.merge(y).merge(z), x.merge(y.merge(z)), z.merge(x).merge(y)):
        check_same(merged, whole)
        assert int(merged.n_seen) == len(a + b + c)


def test_every_sample_is_equally_likely_to_stay():
    # 300 draws of 20 out of 100: each id stays 60 times on average, sd 6.9.
    kept = torch.cat([feed(Reservoir(20, seed), [torch.arange(100)]).ids for seed in range(300)])
    counts = torch.bincount(kept, minlength=100).double()
    assert counts.min() > 60 - 5 * 6.9 and counts.max() < 60 + 5 * 6.9
    # Chi-square with 99 degrees of freedom, scaled by the finite population: mean 99 * 0.8, sd 14.1 * 0.8.
    assert abs(((counts - 60) ** 2 / 60).sum() - 79.2) < 5 * 11.3


def test_rows_keep_their_dtype_and_do_not_pin_what_they_were_cut_from():
    big = torch.zeros(1000, 4, dtype=torch.float16)
    view = big[:10]
    ids = torch.arange(10)
    state = Reservoir(4).update(Reservoir(4).init([view], ids), [view], ids)
    assert state.rows["0"].dtype == torch.float16
    assert state.rows["0"].untyped_storage().nbytes() == 4 * 4 * 2


def test_leading_dimensions_keep_the_same_samples():
    x, ids = torch.randn(2, 3, 30, 5), torch.arange(30)
    state = Reservoir(7).update(Reservoir(7).init([x], ids), [x], ids)
    assert torch.equal(state.rows["0"], x[:, :, state.ids])


def test_nothing_is_copied_when_nothing_enters():
    ids = torch.arange(50)
    state = feed(Reservoir(8), [ids])
    again = Reservoir(8).update(state, rows_of(ids), ids)
    assert again.rows["0"].data_ptr() == state.rows["0"].data_ptr()
    assert int(again.n_seen) == 100


def test_samples_of_other_config_or_layers_do_not_merge():
    ids = torch.arange(9)
    state = feed(Reservoir(4), [ids])
    with pytest.raises(ConfigError, match="size 4, seed 0 and size 4, seed 1"):
        state.merge(feed(Reservoir(4, seed=1), [ids]))
    with pytest.raises(ConfigError, match=r"1 layers, the state has 2"):
        state.merge(Reservoir(4).init([torch.zeros(0, 2)], ids))
    with pytest.raises(ConfigError, match="size=0"):
        Reservoir(0)


def test_a_state_made_in_inference_mode_is_an_ordinary_value():
    ids = torch.arange(9)
    with torch.inference_mode():
        state = feed(Reservoir(4), [ids])
    assert not state.rows["0"].is_inference()
    check_same(feed(Reservoir(4), [ids]), state)
