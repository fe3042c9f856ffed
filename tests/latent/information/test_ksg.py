"""Kraskov's estimate for several columns: closed forms, scikit-learn, repeated rows."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.feature_selection import mutual_info_regression
from tensordict import TensorDict

from neighbor_tools import scored
from tdprobe.errors import TdprobeError
from tdprobe.latent import KsgEstimator, LayerScoring
from tdprobe.latent.disentanglement import mutual_information
from tdprobe.latent.information import ksg, ksg_mutual_information


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_correlated_gaussians(width, rho):
    x, noise = normal(2, 2000, width)
    value, se = ksg_mutual_information(x, 5 * (rho * x + (1 - rho**2) ** 0.5 * noise) - 3)
    # In several columns the density varies within a box, which costs some per cent for each.
    expected = -width / 2 * math.log(1 - rho**2)
    assert abs(value - expected) < 4 * se + 0.06 * (width - 1) * expected


@pytest.mark.parametrize("k", [1, 3, 10])
def test_a_single_column_agrees_with_scikit_learn_and_with_disentanglement(k):
    x, noise = normal(2, 300)
    y = (x + 0.3 * noise).square()
    value, _ = ksg_mutual_information(x, y, k)
    expected = mutual_info_regression(x[:, None].numpy(), y.numpy(), n_neighbors=k, random_state=0)
    assert value == pytest.approx(expected[0], abs=1e-6)
    if k == 3:
        assert value == pytest.approx(mutual_information(x[:, None], y).item(), abs=1e-9)


def test_other_columns_that_say_nothing_change_little():
    x, noise = normal(2, 2000, 2)
    y = x[:, :1] + noise[:, :1]
    (one, se), (two, _) = ksg_mutual_information(x[:, :1], y), ksg_mutual_information(x, y)
    assert one == pytest.approx(0.5 * math.log(2), abs=4 * se) and two == pytest.approx(one, abs=4 * se)


class TestRepeatedRows:
    def test_rows_that_repeat_in_both_count_once_and_are_counted(self):
        x, y = normal(100, 2), normal(100, 3, seed=1)
        y[:, 0] += x[:, 0]
        alone = ksg_mutual_information(x, y)
        with pytest.warns(UserWarning, match="200 of 300 rows repeat earlier ones"):
            again = ksg_mutual_information(x.repeat(3, 1), y.repeat(3, 1))
        assert again == pytest.approx(alone, rel=1e-9)

    def test_values_that_repeat_in_one_layer_only_are_no_copies(self):
        # Four tokens, one direction each, and what comes of them in a context: it tells the token.
        token = torch.arange(400) % 4
        value, _ = ksg_mutual_information(torch.eye(4)[token], 10.0 * token[:, None] + normal(400, 1))
        expected = float(torch.tensor(400.0).double().digamma() - torch.tensor(100.0).double().digamma())
        assert value == pytest.approx(expected, abs=1e-12) and expected == pytest.approx(math.log(4), abs=5e-3)

    def test_the_table_tells_how_many_repeat(self):
        x = torch.cat([normal(50, 2), normal(50, 2)[:20]])
        y = normal(70, 2, seed=1)
        with pytest.warns(UserWarning, match="^20 rows of 'data_a' repeat earlier ones"):
            KsgEstimator()(TensorDict({"data_a": x, "data_b": y}))
        found = scored(KsgEstimator(), x, y)
        assert found["duplicates"].tolist() == [20, 0] and bool(found["score"].isfinite().all())
        model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 2).double())
        model[1].weight.data = torch.diag(torch.tensor([3.0, -0.1])).double()
        with torch.no_grad(), LayerScoring(r"\d", ["ksg"], max_norm=None).prepare(model) as hooked:
            hooked(x)
        with pytest.warns(UserWarning, match="20 rows of '0', 20 rows of '1' repeat earlier ones"):
            table = hooked.hooking_context.scores()
        assert table.meta["duplicates"] == {"0": 20, "1": 20}
        # Another unit for each column: as much as a layer and itself have in common, which is psi(n) - psi(k).
        most = float(torch.tensor(50.0).double().digamma() - torch.tensor(3.0).double().digamma())
        assert table.block("ksg").values.flatten().tolist() == pytest.approx([most] * 4, rel=1e-9)

    def test_too_few_that_differ_have_no_score(self):
        x = normal(3, 2).repeat(10, 1)
        with pytest.warns(UserWarning, match="27 of 30 rows"):
            assert math.isnan(ksg_mutual_information(x, x)[0])
        assert math.isnan(ksg_mutual_information(normal(9, 1), torch.full((9,), math.inf))[0])


def test_blocks_of_rows_change_nothing(monkeypatch):
    layers = [normal(150, 3), normal(150, 2, seed=1), normal(150, 3) + normal(150, 3, seed=2)]
    whole = scored(KsgEstimator(), *layers)
    monkeypatch.setattr(ksg, "BUDGET", 1)
    parts = scored(KsgEstimator(), *layers)
    assert torch.equal(whole["score"], parts["score"]) and torch.equal(whole["se"], parts["se"])
    pair = ksg_mutual_information(layers[0], layers[2])
    assert (whole["score"][0, 2].item(), whole["se"][0, 2].item()) == pytest.approx(pair, rel=1e-9)


def test_wide_layers_come_with_a_warning():
    td = TensorDict({"data_a": normal(40, 21), "data_b": normal(40, 2)})
    with pytest.warns(UserWarning, match="layers of 21 columns.*say little beyond 20"):
        KsgEstimator()(td)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: KsgEstimator(k=0), "k=0; allowed are integers from 1"),
        (lambda x: KsgEstimator(bank_size=0), "size=0"),
        (lambda x: ksg_mutual_information(x, x[:3]), r"x has shape \(9, 2\), y \(3, 2\)"),
        (lambda x: ksg_mutual_information(x[None], x[None]), r"\(1, 9, 2\)"),
        (lambda x: ksg_mutual_information(x[:3], x[:3]), r"got 3 rows; ksg with k=3 needs at least k\+1 = 4"),
        (lambda x: ksg_mutual_information(x, x, k=1.5), "k=1.5"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(normal(9, 2))
    assert isinstance(caught.value, TdprobeError)
