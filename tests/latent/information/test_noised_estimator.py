"""What rows would tell under noise: the estimator."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from tdprobe import LayerScoring
from tdprobe.latent import NoisedInformationEstimator
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.information import kolchinsky_tracey_bounds
from tdprobe.latent.information.noised_estimator import Sandwich
from tdprobe.latent.scorer import Scorer
from tdprobe.stream.batch import Batch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(x, **options):
    td = TensorDict({"data": x}, batch_size=x.shape[:-2])
    for bound in ("lower", "upper"):
        NoisedInformationEstimator(out_key=bound, bound=bound, **options)(td)
    return td["lower"], td["upper"]


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_noise_is_in_units_of_each_feature(noise):
    x = normal(40, 5) * torch.tensor([1.0, 10, 0.1, 3, 2])
    expected = kolchinsky_tracey_bounds(x, noise * x.std(0, correction=0))
    torch.testing.assert_close(both(x, noise=noise), tuple(bound.float() for bound in expected))
    absolute = kolchinsky_tracey_bounds(x, torch.tensor(noise))
    torch.testing.assert_close(both(x, noise=noise, relative=False), tuple(bound.float() for bound in absolute))


def test_two_clusters_tell_one_bit():
    x = torch.cat([torch.zeros(30, 3), torch.ones(30, 3)])
    for bound in both(x, noise=0.01):
        assert bound.item() == pytest.approx(math.log(2))
    # Half the distance of the clusters is one standard deviation: d' = 2 sqrt(3).
    lower, upper = both(x, noise=1.0)
    assert lower.item() == pytest.approx(math.log(2) - math.log1p(math.exp(-12 / 8)), abs=1e-6)
    assert upper.item() == pytest.approx(math.log(2) - math.log1p(math.exp(-12 / 2)), abs=1e-6)


def test_more_noise_tells_less_and_the_limits_are_known():
    x = normal(50, 4)
    found = torch.stack([torch.stack(both(x, noise=noise)) for noise in (1e-3, 0.3, 1.0, 3.0, 1e3)])
    assert bool((found.diff(dim=0) < 0).all())
    torch.testing.assert_close(found[0], torch.full((2,), math.log(50)))
    assert bool((found[-1].abs() < 1e-4).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_leading_dimensions_and_repeats(dtype):
    x = normal(2, 3, 20, 4).to(dtype)
    found = both(x)
    alone = [[both(x[i, j].double()) for j in range(3)] for i in range(2)]
    for place, bound in enumerate(found):
        assert bound.shape == (2, 3) and bound.dtype == torch.float32
        torch.testing.assert_close(bound, torch.tensor([[one[place].item() for one in row] for row in alone]))
    # Rows that repeat others add nothing to what can be told.
    torch.testing.assert_close(both(x.repeat(1, 1, 3, 1)), found)


def test_degenerate_rows():
    for x in (torch.full((9, 3), 0.1), torch.zeros(9, 3), torch.ones(1, 3), torch.zeros(9, 0)):
        for relative in (True, False):
            assert all(abs(bound) < 1e-6 for bound in both(x, relative=relative))
    # A unit that never fires takes nothing away from the others, and adds nothing.
    x = normal(30, 4)
    dead = torch.cat([x, torch.full((30, 2), 0.1)], 1)
    torch.testing.assert_close(both(dead), both(x))
    with pytest.raises(ValueError, match="got 0 rows"):
        both(torch.zeros(0, 3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_nan_out_and_the_layer_is_named(bad):
    x = normal(30, 4)
    x[3, 1] = bad
    with pytest.warns(UserWarning, match="'data' held NaN or infinite"):
        assert all(bound.isnan() for bound in both(x))


def test_both_bounds_of_a_stream_come_from_one_pass(monkeypatch):
    made, run = [], Sandwich.__call__
    monkeypatch.setattr(Sandwich, "__call__", lambda self, state: made.append(self) or run(self, state))
    estimators = [NoisedInformationEstimator(noise=0.5, bound=bound) for bound in ("lower", "upper")]
    scorer, rows = (
        Scorer(resolve_estimators(estimators), portion=16, max_norm=None),
        {"a": normal(70, 3), "b": normal(70, 8)},
    )
    for start in range(0, 70, 9):
        part = slice(start, start + 9)
        scorer.push(Batch({name: x[part] for name, x in rows.items()}, torch.arange(70)[part]))
    found = list(scorer.scores().values())
    assert made == [Sandwich(0.5)]
    for place, x in enumerate(rows.values()):
        expected = torch.stack(both(x, noise=0.5)).double()
        torch.testing.assert_close(torch.stack([f[place] for f in found]), expected, rtol=1e-6, atol=1e-6)


def test_it_is_scored_by_name_in_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    with LayerScoring(r"\d", ["noised_information"]).prepare(model) as hooked:
        hooked(torch.randn(50, 4))
    values = hooked.hooking_context.scores().matrix()
    assert values.shape == (2,) and (values > 1).all() and (values <= math.log(50) + 1e-9).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0}, "noise is a number of standard deviations of each feature, above 0.*got 0"),
        ({"noise": -1.0}, "got -1.0"),
        ({"noise": math.nan}, "got nan"),
        ({"noise": "big"}, "got 'big'"),
        ({"bound": "middle"}, "unknown bound 'middle'.*lower, upper"),
        ({"in_key": 3}, "got key 3"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NoisedInformationEstimator(**options)
