"""Neighbours are exact whatever the data, in bounded memory, and found once for all that need them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neighbor_tools import hard_layers, imbalance, neighbour_distances
from tdprobe.errors import ConfigError
from tdprobe.stats import Neighbors, Reservoir, nearest, ranks_of_one, seen
from tdprobe.stats import distances as distances_module
from tdprobe.stats.distances import Space
from tdprobe.stats.order import parted, smallest

LAYERS = hard_layers()
SINGLE = {f"{name}, {side}": pair[side == "b"] for name, pair in LAYERS.items() for side in "ab"}
RANKS = (1, 2, 7, 20)
INTEGERS = torch.randint(-128, 128, (60, 30), generator=torch.Generator().manual_seed(0))
# Rows whose entries are multiples of some number that is not too small, and rows that almost are such rows.
GRIDS = {
    "one-hot": torch.eye(40) / 3,
    "binary": (INTEGERS > 0).float(),
    "integers": INTEGERS.float(),
    "far off": INTEGERS.double() + 2.0**20 + 0.5,
    "huge": INTEGERS.double() * 2.0**900,
    "tiny": INTEGERS.double() * 2.0**-900,
    "half precision": INTEGERS.half() / 64,
    "repeated": INTEGERS[:7].repeat(3, 1).bfloat16(),
}
ROUNDED = {
    "thirds": INTEGERS.double() / 3,
    "one entry": torch.where(torch.arange(60).unsqueeze(1) == 59, 1e-6, 0.0) + INTEGERS.double(),
    "far too wide": torch.cat([INTEGERS.double(), 2.0**30 + INTEGERS.double()]),
    "gaussian": LAYERS["ordinary"][1],
    "constant": torch.ones(9, 2),
}


@pytest.fixture(params=[2, 10**9], ids=["float32", "float64"])
def products(request, monkeypatch):
    """Compute fast measures in either dtype, whatever costs less."""
    monkeypatch.setattr(distances_module, "PAIR_COST", request.param)
    return torch.float64 if request.param > 2 else torch.float32


@pytest.mark.usefixtures("products")
class TestExactness:
    @pytest.mark.parametrize("rule", [{}, {"distinct": False, "beyond": 1e-5}, {"distinct": False, "beyond": 0.5}])
    @pytest.mark.parametrize("name", SINGLE)
    def test_distances_agree_with_sorting_them_all(self, name, rule):
        found = Neighbors(RANKS, **rule).of_rows([SINGLE[name]]).distances[0]
        torch.testing.assert_close(found, neighbour_distances(SINGLE[name], RANKS, **rule), rtol=1e-9, atol=0)

    @pytest.mark.parametrize("p", [2.0, 1.0, 3.0, float("inf"), 0.0])
    @pytest.mark.parametrize("name", LAYERS)
    def test_imbalance_agrees_with_ranking_row_by_row(self, name, p):
        x, y = LAYERS[name]
        found = Neighbors(imbalance=True, p=p).of_rows([x, y]).imbalance
        assert float(found[0, 1]) == pytest.approx(imbalance(x, y, p), abs=1e-9)
        assert float(found[1, 0]) == pytest.approx(imbalance(y, x, p), abs=1e-9)
        assert float(found[0, 0]) == pytest.approx(imbalance(x, x, p), abs=1e-9)

    def test_many_layers_at_once_are_the_pairs_one_by_one(self):
        rows = [x for name in ("related", "repeated", "rectified", "massive column") for x in LAYERS[name]]
        whole = Neighbors((1, 4), imbalance=True).of_rows(rows)
        for a in range(len(rows)):
            for b in range(len(rows)):
                pair = Neighbors(imbalance=True).of_rows([rows[a], rows[b]]).imbalance
                assert float(whole.imbalance[a, b]) == pytest.approx(float(pair[0, 1]), rel=1e-14)
        assert torch.equal(whole.distances[3], Neighbors((1, 4)).of_rows([rows[3]]).distances[0])

    @pytest.mark.parametrize("name", ["ordinary", "outliers", "massive column", "tight clusters", "offset", "line"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_fast_measures_err_by_no_more_than_their_slack(self, name, dtype):
        for x in LAYERS[name]:
            space, rows = Space(x), torch.arange(len(x))
            exact = space.exact_block(rows)
            off = (space.block(rows, dtype).double() + space.offset(rows, dtype).unsqueeze(1) - exact).abs()
            other = space.own != torch.arange(space.points).unsqueeze(1)
            assert bool((off <= space.slack(rows, exact, dtype))[other.mT].all())

    @pytest.mark.parametrize("name", ["ordinary", "outliers", "massive column", "tight clusters", "offset", "line"])
    def test_measures_kept_as_float32_err_by_no_more_than_their_slack(self, name):
        for x in LAYERS[name]:
            space, rows = Space(x), torch.arange(len(x))
            block = seen.Seen.of(space, rows, space.block(rows, torch.float64), 2)
            kept = block.rounded(torch.empty(len(rows), space.points))
            exact = space.exact_block(rows)
            other = (space.own != torch.arange(space.points).unsqueeze(1)).mT
            assert bool(((kept.block.double() - exact).abs() <= kept.slack(exact))[other].all())
            assert bool(
                (exact <= kept.ceiling(kept.block.double(), torch.arange(space.points).expand_as(exact)))[other].all()
            )

    @pytest.mark.parametrize("share", [1, 20, 45])
    def test_a_few_huge_rows_do_not_coarsen_what_is_known_of_the_others(self, share):
        x = torch.randn(400, 16, generator=torch.Generator().manual_seed(share))
        huge = torch.arange(400) < 4 * share
        alone = Space(x[~huge])
        mixed = Space(torch.where(huge.unsqueeze(1), 1e4 + 10 * x, x))
        rows, reach = torch.arange(400)[~huge], torch.full((int((~huge).sum()),), 30.0)
        slack = mixed.slack(rows, reach * mixed.scale**2, torch.float32) / mixed.scale**2
        usual = alone.slack(rows - 4 * share, reach * alone.scale**2, torch.float32) / alone.scale**2
        # About the mean, rows would be as long as the huge ones, and the slack 10,000 times this.
        assert bool((slack <= 3 * usual).all())

    @pytest.mark.parametrize("offset", [0, 1000, 2**20 + 0.5])
    def test_distances_of_integers_are_those_of_exact_squares(self, offset, products):
        x = torch.randint(-9, 9, (200, 30), generator=torch.Generator().manual_seed(1)).double()
        squares = (x.unsqueeze(1) - x).square().sum(2).fill_diagonal_(torch.inf).sort(1).values
        assert torch.equal(Neighbors((1, 5)).of_rows([x + offset]).distances[0], squares[:, [0, 4]].sqrt())

    @pytest.mark.parametrize("name", GRIDS)
    def test_products_that_round_nothing_stand_for_differences(self, name, products):
        x = GRIDS[name]
        space, rows = Space(x), torch.arange(len(x))
        assert space.nothing_rounds
        scaled = space.scale * x.double()
        exact = (scaled.unsqueeze(1) - scaled[space.first]).square().sum(2)
        row, point = torch.ones_like(exact).nonzero().unbind(1)
        assert torch.equal(space.exact(row, point).view_as(exact), exact)
        exact[rows, space.own] = torch.inf
        assert torch.equal(space.exact_block(rows), exact)

    @pytest.mark.parametrize("name", ROUNDED)
    def test_products_that_round_are_told(self, name):
        assert not Space(ROUNDED[name]).nothing_rounds

    def test_lower_precision_of_products_is_noticed(self, monkeypatch):
        x, y = LAYERS["ordinary"]
        usual = Neighbors(RANKS, imbalance=True).of_rows([x, y])
        assert Space(x).dtype == torch.float32
        monkeypatch.setattr(distances_module, "float32_is_exact", lambda device: False)
        assert Space(x).dtype == torch.float64
        careful = Neighbors(RANKS, imbalance=True).of_rows([x, y])
        assert torch.equal(careful.imbalance, usual.imbalance)
        torch.testing.assert_close(careful.distances, usual.distances, rtol=1e-12, atol=0)

    def test_ordinary_rows_are_settled_by_the_first_products(self, products, monkeypatch):
        monkeypatch.setattr(nearest, "_by_differences", None)
        blocks, pairs = [], []
        block, fine, exact = Space.block, Space.fine, Space.exact
        monkeypatch.setattr(Space, "block", lambda *given, **how: blocks.append(given) or block(*given, **how))
        monkeypatch.setattr(Space, "fine", lambda *given: pairs.append(len(given[1])) or fine(*given))
        # Products in float64, of blocks or of pairs, leave nothing to measure exactly.
        monkeypatch.setattr(Space, "exact", lambda *given: exact(*given) if len(given[1]) == 0 else None)
        Neighbors(RANKS, imbalance=True).of_rows(list(LAYERS["ordinary"]))
        assert len(blocks) == 2
        assert sum(pairs) == 0 if products == torch.float64 else sum(pairs) > len(LAYERS["ordinary"][0])

    def test_products_are_of_the_dtype_that_costs_less(self):
        x = LAYERS["ordinary"][0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distances_module, "PAIR_COST", 200)
            found = [Space(x.repeat(times, 1).cumsum(0), asked=30).dtype for times in (1, 39, 41)]
        assert found == [torch.float64, torch.float64, torch.float32]

    @pytest.mark.parametrize("order", ["by row", "shuffled"])
    @pytest.mark.parametrize("name", ["ordinary", "outliers", "massive column", "tight clusters", "offset", "line"])
    def test_products_of_pairs_err_by_no_more_than_those_of_blocks(self, name, order, products):
        for x in LAYERS[name]:
            space = Space(x)
            rows, points = (torch.arange(len(x)).unsqueeze(1) != space.first[::3]).nonzero().unbind(1)
            shuffled = torch.randperm(len(rows)) if order == "shuffled" else torch.arange(len(rows))
            rows, points = rows[shuffled], 3 * points[shuffled]
            other = space.own[rows] != points
            rows, points = rows[other], points[other]
            found, exact = space.fine(rows, points), space.exact(rows, points)
            assert bool(((found - exact).abs() <= space.slack(rows, exact, torch.float64)).all())

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**31))
    def test_points_that_layers_share_are_ranked_once(self, rows, layers, seed):
        point = torch.randint(0, 6, (rows, layers), generator=torch.Generator().manual_seed(seed))
        listed, place = ranks_of_one._distinct(point)
        assert torch.equal(listed.gather(1, place), point)
        for row, found in zip(point.tolist(), listed.tolist(), strict=True):
            assert [number for number in found if number >= 0] == sorted(set(row))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(-9, 9), min_size=1, max_size=300), st.integers(1, 40))
    def test_smallest_finds_what_sorting_finds(self, values, k):
        row = torch.tensor([values], dtype=torch.float32)
        found, places = smallest(row, k)
        assert torch.equal(found.sort().values, row.sort().values[:, :k])
        assert torch.equal(row.gather(1, places), found) and len(set(places[0].tolist())) == found.shape[1]

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 3), st.sampled_from([1, 7, 8, 9, 2039, 2040, 2041, 4090]), st.integers(0, 2**31), st.booleans()
    )
    def test_parted_finds_what_comparing_finds(self, rows, columns, seed, wide):
        generator = torch.Generator().manual_seed(seed)
        block = torch.randint(-9, 9, (rows, columns), generator=generator).to(torch.float64 if wide else torch.float32)
        block[:, -1] = torch.inf
        low = torch.randint(-12, 9, (rows,), generator=generator).to(block.dtype)
        found = parted(block, low, high := low + 1)
        between = (block >= low.unsqueeze(1)) & (block <= high.unsqueeze(1))
        assert torch.equal(found.mask, block < low.unsqueeze(1))
        assert torch.equal(found.below, found.mask.sum(1))
        assert torch.equal(torch.stack([found.row, found.place]), torch.stack(between.nonzero().unbind(1)))


class Watch(TorchDispatchMode):
    """Record the largest tensor that an operation makes, and the longest rows that are sorted."""

    largest, sorted_rows = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Views and broadcasts of what exists cost nothing.
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        made = [x.values() if x.layout == torch.sparse_csr else x for x in made]
        self.largest = max([self.largest, *(x.untyped_storage().nbytes() for x in made)])
        if "sort" in str(func) and "search" not in str(func) and args[0].ndim > 1:
            self.sorted_rows = max(self.sorted_rows, args[0].shape[-1])
        return out


class TestMemory:
    @pytest.mark.parametrize("config", [Neighbors((1, 2)), Neighbors((30, 60)), Neighbors((1, 2), imbalance=True)])
    def test_is_bounded_by_the_block_and_nothing_of_length_n_is_sorted(self, config, monkeypatch):
        n = 3000
        monkeypatch.setattr(seen, "BUDGET", 2**19)
        rows = [torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        with Watch() as watch:
            config.of_rows(rows)
        # The matrix would be 36 MB; indices of the candidates in a block are what is largest.
        assert 0 < watch.largest <= 4 * 2**20
        assert watch.sorted_rows <= 60 + 4

    def test_blocks_do_not_show_in_the_result(self, monkeypatch):
        rows = [*LAYERS["related"], *LAYERS["repeated"], *LAYERS["binary"]]
        whole = Neighbors(RANKS, imbalance=True).of_rows(rows)
        monkeypatch.setattr(seen, "BLOCK", 17)
        for module in (distances_module, nearest):
            monkeypatch.setattr(module, "EXACT_BLOCK", 500)
        monkeypatch.setattr(distances_module, "STEP", 64)
        parts = Neighbors(RANKS, imbalance=True).of_rows(rows)
        torch.testing.assert_close(parts.imbalance, whole.imbalance, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts.distances, whole.distances, rtol=1e-12, atol=0)


class TestTable:
    def test_repeated_rows_are_counted_once_each(self):
        x = torch.tensor([[1.0], [2.0], [1.0], [-0.0], [1.0], [0.0]])
        table = Neighbors((1,)).of_rows([x, x + 1])
        assert table.repeated[0].tolist() == [False, False, True, False, True, True]
        assert table.duplicates.tolist() == [3, 3]

    def test_asked_for_nothing_it_counts_repeated_rows(self):
        rows = torch.tensor([[0.0], [1.0], [0.0]])
        assert Neighbors().of_rows([rows]).duplicates.tolist() == [1]

    def test_no_rows_have_no_neighbours(self):
        table = Neighbors((1,), imbalance=True, places=2).of_rows([torch.zeros(0, 3), torch.zeros(0, 2)])
        assert table.distances.shape == (2, 0, 1) and table.places.shape == (2, 0, 2)
        assert table.imbalance.isnan().all() and table.duplicates.tolist() == [0, 0]

    def test_a_layer_that_is_not_finite_scores_nan_and_leaves_the_others_alone(self):
        x, y = LAYERS["ordinary"]
        bad = x.clone()
        bad[3, 1] = torch.nan
        table = Neighbors((1, 2), imbalance=True).of_rows([x, bad, y])
        assert table.finite.tolist() == [True, False, True]
        good = Neighbors((1, 2), imbalance=True).of_rows([x, y])
        assert torch.equal(table.imbalance[[0, 0, 2, 2], [0, 2, 0, 2]], good.imbalance.flatten())
        assert table.imbalance[1].isnan().all() and table.imbalance[:, 1].isnan().all()
        assert table.distances[1].isnan().all() and torch.equal(table.distances[[0, 2]], good.distances)

    def test_leading_dimensions_are_data_sets_of_their_own(self):
        x, y = torch.randn(2, 3, 40, 4), torch.randn(2, 3, 40, 2)
        whole = Neighbors((1, 3), imbalance=True).of_rows([x, y])
        assert whole.distances.shape == (2, 3, 2, 40, 2) and whole.imbalance.shape == (2, 3, 2, 2)
        one = Neighbors((1, 3), imbalance=True).of_rows([x[1, 2], y[1, 2]])
        assert torch.equal(whole.imbalance[1, 2], one.imbalance)
        assert torch.equal(whole.distances[1, 2], one.distances)

    def test_nothing_counts_where_all_rows_are_nearer_than_any_scale_of_theirs(self):
        rows = torch.arange(4.0, dtype=torch.float64).unsqueeze(1) * 1e-310
        assert Neighbors((1,), distinct=False, beyond=0.5).of_rows([rows]).distances.isinf().all()

    def test_a_bank_gives_what_its_rows_give(self):
        x, ids = torch.randn(60, 4), torch.arange(60) * 7
        state = Reservoir(25).update(Reservoir(25).init([x], ids), [x], ids)
        table = Neighbors((1, 2))(state)
        assert torch.equal(table.ids, state.ids) and int(table.n) == 25
        assert torch.equal(table.distances, Neighbors((1, 2)).of_rows([x[state.ids // 7]]).distances)

    def test_ranks_are_looked_up_by_number(self):
        table = Neighbors((2, 5)).of_rows([torch.randn(9, 2)])
        assert torch.equal(table.at(5), table.distances[..., 1])
        with pytest.raises(ConfigError, match=r"lacks rank 1; it holds \[2, 5\]"):
            table.at(1)

    def test_modes_of_the_caller_do_not_reach_in(self):
        x, y = LAYERS["related"]
        plain = Neighbors((1,), imbalance=True).of_rows([x, y])
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            found = Neighbors((1,), imbalance=True).of_rows([x, y])
        assert torch.equal(found.distances, plain.distances) and not found.distances.is_inference()
        assert torch.equal(found.imbalance, plain.imbalance)
        assert not Neighbors((1,)).of_rows([x.clone().requires_grad_()]).distances.requires_grad


class TestJoining:
    def test_serves_both(self):
        joined = Neighbors((1, 2)).joined(Neighbors((2, 9), imbalance=True))
        assert joined == Neighbors((1, 2, 9), imbalance=True)
        assert hash(joined) == hash(Neighbors((1, 2, 9), imbalance=True))

    @pytest.mark.parametrize("other", [Neighbors((1,), p=1.0), Neighbors((1,), distinct=False), "cka"])
    def test_of_different_rules_is_refused(self, other):
        assert Neighbors((1, 2)).joined(other) is None


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(3, 40), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_random_small_integers_with_all_their_ties(products, seed, n, width, high, distinct):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, high + 1, (n, width), generator=g).float() for _ in range(2))
    rule = {"distinct": distinct}
    found = Neighbors((1, 2, 3), **rule).of_rows([x]).distances[0]
    torch.testing.assert_close(found, neighbour_distances(x, (1, 2, 3), **rule), rtol=1e-12, atol=0)
    table = Neighbors(imbalance=True).of_rows([x, y]).imbalance
    assert float(table[0, 1]) == pytest.approx(imbalance(x, y), abs=1e-12)
    order = torch.randperm(n, generator=g)
    assert torch.allclose(Neighbors(imbalance=True).of_rows([x[order], y[order]]).imbalance, table, rtol=1e-14)


@pytest.mark.parametrize("kind", hard_layers())
def test_counting_and_sorting_give_the_same_ranks(kind, products, monkeypatch):
    rows = list(hard_layers()[kind])
    found = {}
    for bound in (1, 99):
        monkeypatch.setattr("tdprobe.stats.ranks_of_one.sorting_pays_from", lambda device, bound=bound: bound)
        found[bound] = Neighbors(imbalance=True).of_rows(rows).imbalance
    assert torch.equal(found[1], found[99])
    assert float(found[1][0, 1]) == pytest.approx(imbalance(*rows), abs=1e-9)


@pytest.mark.parametrize("kind", hard_layers())
def test_partners_ranked_one_by_one_and_together_have_the_same_ranks(kind, products, monkeypatch):
    rows = list(hard_layers()[kind])
    found = {}
    for crowded in (-1, 2):
        monkeypatch.setattr("tdprobe.stats.mean_ranks.CROWDED", crowded)
        found[crowded] = Neighbors(imbalance=True).of_rows(rows).imbalance
    torch.testing.assert_close(found[-1], found[2], rtol=1e-14, atol=0)
    assert float(found[2][1, 0]) == pytest.approx(imbalance(*rows[::-1]), abs=1e-9)


@pytest.mark.parametrize("kind", ["repeated", "repeated in both"])
def test_copies_are_not_compared_with_all_points(kind, products, monkeypatch):
    monkeypatch.setattr("tdprobe.stats.mean_ranks._ranks_of_several", None)
    rows = list(hard_layers()[kind])
    found = Neighbors(imbalance=True).of_rows(rows).imbalance
    assert float(found[0, 1]) == pytest.approx(imbalance(*rows), abs=1e-9)


@pytest.mark.parametrize("p", [2.0, float("inf")])
@pytest.mark.parametrize("kind", ["related", "lattice", "tight clusters"])
def test_doubts_may_be_decided_some_at_a_time(kind, p, monkeypatch):
    rows = list(hard_layers()[kind])
    expected = Neighbors(imbalance=True, p=p).of_rows(rows).imbalance
    monkeypatch.setattr(ranks_of_one, "HELD", 0)
    monkeypatch.setattr(ranks_of_one, "COMPARED", 1000)
    assert torch.equal(Neighbors(imbalance=True, p=p).of_rows(rows).imbalance, expected)


@pytest.mark.parametrize("doubtful", [0, 1e9], ids=["float64", "float32"])
def test_layers_that_share_little_take_products_in_float64_and_give_the_same(doubtful, monkeypatch):
    monkeypatch.setattr(seen, "BLOCK", 100)
    monkeypatch.setattr("tdprobe.stats.partners.DOUBTFUL", doubtful)
    blocks, block = [], Space.block
    monkeypatch.setattr(
        Space, "block", lambda self, *given, **how: blocks.append(self.dtype) or block(self, *given, **how)
    )
    x = torch.randn(3, 300, 40, generator=torch.Generator().manual_seed(0)).unbind()
    found = Neighbors((1, 3), imbalance=True).of_rows(x)
    assert blocks[:3] == 3 * [torch.float32]
    assert set(blocks[3:]) == {torch.float32 if doubtful else torch.float64}
    for a, b in ((0, 1), (1, 2), (2, 0)):
        assert float(found.imbalance[a, b]) == pytest.approx(imbalance(x[a], x[b]), abs=1e-12)
    torch.testing.assert_close(found.distances[1], neighbour_distances(x[1], (1, 3)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("bound", [1, 99], ids=["sorting", "counting"])
def test_what_float32_keeps_of_nearly_equal_distances_is_told_apart_by_products(bound, monkeypatch):
    monkeypatch.setattr("tdprobe.stats.ranks_of_one.sorting_pays_from", lambda device: bound)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).double()
    x = torch.eye(60, dtype=torch.float64) * (1 + 1e-8 * order.unsqueeze(1) / 60)
    measured, exact = [], Space.exact
    monkeypatch.setattr(Space, "exact", lambda *given: measured.append(len(given[1])) or exact(*given))
    found = Neighbors(imbalance=True).of_rows([x, x.roll(1, 0)]).imbalance
    assert sum(measured) == 0
    assert float(found[0, 1]) == pytest.approx(imbalance(x, x.roll(1, 0)), abs=1e-12)
