"""Nearest rows are listed with their ties, and pairs within a distance are counted, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neighbor_tools import distances, hard_layers, neighbour_distances, shared_neighbours
from tdprobe.errors import ConfigError
from tdprobe.stats import Neighbors, neighborhoods, products, radius
from tdprobe.stats.neighborhoods import mean_terms
from tdprobe.stats.radius import count_within

SINGLE = {f"{name}, {side}": pair[side == "b"] for name, pair in hard_layers().items() for side in "ab"}


def table_of(rows, k, **rule):
    return Neighbors(tuple(range(1, k + 2)), places=k, **rule).of_rows(rows)


def lists_of(table, k):
    """Collect what the terms are given: by layer and row, {row: (share, rank)}."""
    found = []

    def terms(hoods, data):
        for place in range(len(hoods.rows)):
            row = []
            for layer in range(len(data)):
                columns = (x[layer, place].tolist() for x in (hoods.other, hoods.share, hoods.rank))
                row.append({j: (share, rank) for j, share, rank in zip(*columns, strict=True) if share > 0})
            found.append(row)
        return torch.zeros(len(hoods.rows), len(data), len(data), dtype=torch.float64)

    mean_terms(table, k, terms)
    return [list(column) for column in zip(*found, strict=True)]


def assert_same_lists(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for j, pair in theirs.items():
            assert ours[j] == pytest.approx(pair, rel=1e-12)


class TestPlaces:
    @pytest.mark.parametrize("name", SINGLE)
    def test_the_rows_listed_are_at_the_distances_listed(self, name):
        x = SINGLE[name]
        table = table_of([x], 12)
        places, found = table.places[0], table.distances[0]
        assert torch.equal(places >= 0, found[:, :12] < torch.inf)
        x = x if x.shape[1] else torch.zeros(len(x), 1)
        measured = distances(x).gather(1, places.clamp(min=0))
        torch.testing.assert_close(measured[places >= 0], found[:, :12][places >= 0], rtol=1e-9, atol=0)
        # The first of equal rows stands for all of them, and each row is there once.
        assert torch.equal(table.first[0][places.clamp(min=0)], places.clamp(min=0))
        assert all(len({j for j in row if j >= 0}) == sum(j >= 0 for j in row) for row in places.tolist())
        assert not (places == table.first[0].unsqueeze(1)).any()

    def test_joined_tables_list_what_either_wants(self):
        assert Neighbors((1,), places=4).joined(Neighbors((2,), places=9)) == Neighbors((1, 2), places=9)
        assert Neighbors((1,), directions=True).joined(Neighbors((1,))) is None
        with pytest.raises(ConfigError, match="got places without distinct=True"):
            Neighbors((1,), distinct=False, places=3)

    def test_directions_are_compared_at_length_one(self):
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).exp()
        unit = torch.nn.functional.normalize(x.double(), dim=1)
        found = table_of([x], 5, directions=True).distances[0]
        torch.testing.assert_close(found, neighbour_distances(unit, range(1, 7)), rtol=1e-9, atol=0)

    def test_rows_are_not_copied(self):
        x = torch.randn(20, 3)
        assert table_of([x], 3).rows["0"].data_ptr() == x.data_ptr()


class TestLists:
    @pytest.mark.parametrize("k", [1, 10])
    @pytest.mark.parametrize("name", SINGLE)
    def test_shares_and_ranks_are_those_of_going_through_each_row(self, name, k):
        (found,) = lists_of(table_of([SINGLE[name]], k), k)
        assert_same_lists(found, shared_neighbours(SINGLE[name], k))

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10**6), st.integers(4, 30), st.integers(1, 3), st.integers(1, 4))
    def test_small_integers_with_all_their_ties(self, seed, n, width, high):
        g = torch.Generator().manual_seed(seed)
        rows = [torch.randint(0, high + 1, (n, width), generator=g).float() for _ in range(2)]
        k = 1 + seed % (n - 2)
        for found, x in zip(lists_of(table_of(rows, k), k), rows, strict=True):
            assert_same_lists(found, shared_neighbours(x, k))

    def test_blocks_do_not_show(self, monkeypatch):
        rows = [SINGLE["repeated, a"], SINGLE["lattice, a"], SINGLE["ordinary, b"]]
        whole = lists_of(table_of(rows, 7), 7)
        monkeypatch.setattr(neighborhoods, "BUDGET", 1)
        monkeypatch.setattr(neighborhoods, "EXACT_BLOCK", 300)
        for ours, theirs in zip(lists_of(table_of(rows, 7), 7), whole, strict=True):
            assert_same_lists(ours, theirs)

    def test_mean_terms_have_the_error_of_a_mean(self):
        table, terms = table_of([torch.randn(300, 3)], 2), []

        def squares(hoods, data):
            terms.append(hoods.rows.double().square().view(-1, 1, 1))
            return terms[-1]

        mean, se = mean_terms(table, 2, squares)
        values = torch.cat(terms).flatten()
        assert float(mean) == pytest.approx(float(values.mean())) and len(values) == 300
        assert float(se) == pytest.approx(float(values.std() / 300**0.5))


class TestRadius:
    @pytest.mark.parametrize("name", SINGLE)
    def test_counts_are_those_of_all_distances(self, name, monkeypatch):
        x = SINGLE[name]
        x = x if x.shape[1] else torch.zeros(len(x), 1)
        points = torch.unique(x, dim=0)
        apart = torch.cdist(x.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
        apart[apart == 0] = torch.inf
        finite = apart[apart < torch.inf]
        # Distances that occur are on the edge: rows at exactly one of them are not within it.
        radii = finite.quantile(torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)) if len(finite) else torch.ones(3)
        expected = (apart.unsqueeze(2) < radii * (1 - 1e-13)).sum(1).double()
        rows = torch.arange(0, len(x), 3)
        assert torch.equal(count_within(x, rows, radii), expected[rows])
        monkeypatch.setattr(radius, "BLOCK", 7)
        monkeypatch.setattr(products, "TILE", 16)
        assert torch.equal(count_within(x, rows, radii), expected[rows])

    def test_no_rows_have_no_counts(self):
        assert count_within(torch.randn(5, 2), torch.arange(0), torch.ones(2)).shape == (0, 2)
