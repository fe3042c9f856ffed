"""Bounds of information: closed forms, the integral in one dimension, and each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdprobe.errors import TdprobeError
from tdprobe.latent.information import bounds
from tdprobe.latent.information.bounds import info_nce_bound, kolchinsky_tracey_bounds, leave_one_out_bound
from tdprobe.latent.information.entropy import mutual_information_sub_batch

few = settings(max_examples=25, deadline=None)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def integrated(means: Tensor, stds: Tensor, weights: Tensor) -> float:
    """Return the information of a mixture in one dimension by the trapezoidal rule: H(Y) - H(Y|X)."""
    low, high = (means - 12 * stds).min(), (means + 12 * stds).max()
    y = torch.linspace(float(low), float(high), 40_001, dtype=torch.float64)
    density = (weights * torch.distributions.Normal(means, stds).log_prob(y[:, None]).exp()).sum(-1)
    entropy = -torch.trapezoid(torch.xlogy(density, density), y)
    return float(entropy - (weights * (stds.log() + 0.5 * math.log(2 * math.pi * math.e))).sum())


def test_the_oracle_of_the_tests():
    half = torch.tensor([0.5, 0.5])
    means, stds = column(-1.5, 1.5)[:, 0], column(0.6, 1.1)[:, 0]
    assert integrated(means, stds, half) == pytest.approx(0.591146724351, abs=1e-9)
    far = {1: 0.111421482183, 2: 0.336830820343, 4: 0.632720193728, 10: 0.693146317393}
    for distance, information in far.items():
        apart = torch.tensor([0.0, distance]).double()
        assert integrated(apart, torch.ones(2).double(), half) == pytest.approx(information, abs=1e-9)


# Without samples.


def test_known_bounds_of_a_mixture():
    lower, upper = kolchinsky_tracey_bounds(column(-1.5, 1.5), column(0.6, 1.1))
    assert lower.item() == pytest.approx(0.495324525598, abs=1e-11)
    assert upper.item() == pytest.approx(0.683833454650, abs=1e-11)


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("shared", [True, False])
def test_two_unit_gaussians_have_closed_bounds(distance, shared):
    std = torch.tensor(1.0) if shared else torch.ones(2, 3)
    means = torch.zeros(2, 3).double()
    means[1, 1] = distance
    lower, upper = kolchinsky_tracey_bounds(means, std)
    assert lower.item() == pytest.approx(math.log(2) - math.log1p(math.exp(-(distance**2) / 8)), abs=1e-12)
    assert upper.item() == pytest.approx(math.log(2) - math.log1p(math.exp(-(distance**2) / 2)), abs=1e-12)


@few
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0.2, 3), st.floats(0.1, 1)), min_size=1, max_size=5),
)
def test_the_information_lies_between(components):
    means, stds, weights = (torch.tensor(x, dtype=torch.float64) for x in zip(*components, strict=True))
    lower, upper = kolchinsky_tracey_bounds(means[:, None], stds[:, None], weights)
    information = integrated(means, stds, weights / weights.sum())
    assert -1e-9 <= lower <= information + 1e-7 and information <= upper + 1e-7
    assert upper <= math.log(len(components)) + 1e-9


@few
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 6))
def test_shared_noise_is_a_special_case_and_invariances_hold(seed, k, width):
    g = torch.Generator().manual_seed(seed)
    means, weights = torch.randn(k, width, generator=g).double(), torch.rand(k, generator=g).double() + 0.1
    stds = torch.rand(width, generator=g).double() + 0.2
    found = kolchinsky_tracey_bounds(means, stds, weights)
    torch.testing.assert_close(kolchinsky_tracey_bounds(means, stds.expand(k, width), weights), found)
    scale = torch.rand(width, generator=g).double() + 0.5
    order = torch.randperm(k, generator=g)
    moved = kolchinsky_tracey_bounds((scale * means + 7)[order], scale * stds, 3 * weights[order])
    torch.testing.assert_close(moved, found, rtol=1e-9, atol=1e-9)
    assert -1e-12 <= found[0] <= found[1] + 1e-12 and found[1] <= math.log(k) + 1e-12


def test_repeated_components_tell_nothing_and_weight_zero_is_absence():
    means = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    one = torch.tensor(0.1)
    plain = kolchinsky_tracey_bounds(means, one)
    torch.testing.assert_close(kolchinsky_tracey_bounds(means.repeat(2, 1), one), plain)
    lower, upper = kolchinsky_tracey_bounds(torch.ones(5, 4), one)
    assert abs(lower) < 1e-7 and abs(upper) < 1e-7
    for far in (7.0, 1e30, torch.nan):
        more = torch.cat([means, torch.full((1, 4), far).double()])
        weighted = kolchinsky_tracey_bounds(more, one, torch.tensor([1.0, 1.0, 1.0, 0.0]))
        torch.testing.assert_close(weighted, plain)
        each = kolchinsky_tracey_bounds(more, one.expand(4, 4), torch.tensor([1.0, 1.0, 1.0, 0.0]))
        torch.testing.assert_close(each, plain)


@pytest.mark.parametrize("shared", [True, False])
def test_leading_dimensions_and_chunks(shared, monkeypatch):
    g = torch.Generator().manual_seed(0)
    means = torch.randn(2, 3, 9, 4, generator=g).double()
    stds = (torch.rand(3, 1, 4, generator=g) if shared else torch.rand(2, 3, 9, 4, generator=g)).double() + 0.3
    whole = kolchinsky_tracey_bounds(means, stds)
    monkeypatch.setattr(bounds, "TABLE", 100)
    torch.testing.assert_close(kolchinsky_tracey_bounds(means, stds), whole)
    for i in range(2):
        for j in range(3):
            alone = kolchinsky_tracey_bounds(means[i, j], stds[j] if shared else stds[i, j])
            torch.testing.assert_close((whole[0][i, j], whole[1][i, j]), alone)


def test_far_from_the_origin_digits_stay():
    g = torch.Generator().manual_seed(0)
    means = torch.randn(20, 5, generator=g)
    found = kolchinsky_tracey_bounds(means + 4096, torch.tensor(2.0))
    exact = kolchinsky_tracey_bounds((means + 4096).double() - 4096, torch.tensor(2.0))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(exact), rtol=1e-6, atol=0)
    half = kolchinsky_tracey_bounds(means.bfloat16(), torch.tensor(2.0))
    assert torch.equal(half[1], kolchinsky_tracey_bounds(means.bfloat16().float(), torch.tensor(2.0))[1])


@pytest.mark.parametrize("shared", [True, False])
def test_bounds_have_gradients(shared):
    g = torch.Generator().manual_seed(0)
    means = torch.randn(4, 3, generator=g).double().requires_grad_()
    stds = (torch.rand(3 if shared else 12, generator=g).double() + 0.5).reshape(-1, 3).requires_grad_()
    assert torch.autograd.gradcheck(kolchinsky_tracey_bounds, (means, stds))
    samples = torch.randn(4, 3, generator=g).double().requires_grad_()
    for bound in (info_nce_bound, leave_one_out_bound):
        assert torch.autograd.gradcheck(bound, (means, stds, samples))


# With samples.


def log_densities(means: Tensor, stds: Tensor, samples: Tensor) -> Tensor:
    return torch.distributions.Normal(means, stds.expand(means.shape)).log_prob(samples[:, None]).sum(-1)


@few
@given(st.integers(0, 10_000), st.integers(2, 9), st.booleans())
def test_sampled_bounds_are_their_definitions(seed, k, shared):
    g = torch.Generator().manual_seed(seed)
    means, samples = torch.randn(2, k, 3, generator=g).double()
    stds = torch.rand(() if shared else (k, 3), generator=g).double() + 0.3
    table = log_densities(means, stds, samples).exp()
    own = table.diag().clone()
    expected = (own / table.mean(1)).log().mean()
    torch.testing.assert_close(info_nce_bound(means, stds, samples), expected)
    expected = (own / (table.fill_diagonal_(0).sum(1) / (k - 1))).log().mean()
    torch.testing.assert_close(leave_one_out_bound(means, stds, samples), expected)
    assert info_nce_bound(means, stds, samples) <= math.log(k) + 1e-12


@pytest.mark.parametrize("snr", [0.1, 1.0, 10.0])
def test_the_sandwich_holds_the_information_of_a_gaussian_channel(snr):
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 300, 64, 1, generator=g).double()
    std = torch.tensor(snr**-0.5)
    y = x + std * noise
    found = torch.stack([bound(x, std, y) for bound in (info_nce_bound, leave_one_out_bound)])
    (lower, upper), error = found.mean(1), found.std(1) / 300**0.5
    information = 0.5 * math.log(1 + snr)
    assert lower - 4 * error[0] <= information <= upper + 4 * error[1]
    # With 64 components the gap is small, so that neither end is idle.
    assert upper - lower < 0.1 * information + 0.2


def test_they_agree_with_the_training_loss():
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 400, 1, 2, generator=g)
    std = torch.tensor(0.7)
    y = x + std * noise
    loss = mutual_information_sub_batch(
        0 * x, std.expand_as(x), torch.ones(400, 1), x, y, estimator="mixture", conditional="sampled", symmetric=True
    )
    low, high = (bound(x[:, 0], std, y[:, 0]) for bound in (info_nce_bound, leave_one_out_bound))
    assert low.item() == pytest.approx(loss.item(), abs=0.15) and high.item() == pytest.approx(loss.item(), abs=0.15)


def test_sampled_bounds_take_leading_dimensions_and_one_component():
    g = torch.Generator().manual_seed(0)
    means, samples = torch.randn(2, 2, 3, 5, 4, generator=g)
    stds = torch.rand(3, 1, 4, generator=g) + 0.5
    for bound in (info_nce_bound, leave_one_out_bound):
        found = bound(means, stds, samples)
        alone = [[bound(means[i, j], stds[j], samples[i, j]) for j in range(3)] for i in range(2)]
        torch.testing.assert_close(found, torch.tensor(alone))
    one = torch.ones(1, 4)
    assert info_nce_bound(one, one, one) == 0
    assert all(bound == 0 for bound in kolchinsky_tracey_bounds(one, one))


# Errors.


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_shows(bad):
    means = torch.ones(4, 3)
    means[1, 1] = bad
    for shared in (True, False):
        stds = torch.ones(1 if shared else 4, 3)
        assert all(x.isnan() for x in kolchinsky_tracey_bounds(means, stds))
    assert info_nce_bound(means, torch.ones(3), means).isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kolchinsky_tracey_bounds(x[0], x[0]), r"means have shape \(3,\)"),
        (lambda x: kolchinsky_tracey_bounds(x[:0], x[0]), r"means have shape \(0, 3\)"),
        (lambda x: kolchinsky_tracey_bounds(x, x[:, :2]), r"stds have shape \(4, 2\).*broadcast to \(4, 3\)"),
        (lambda x: kolchinsky_tracey_bounds(x, x[None, None]), r"stds have shape \(1, 1, 4, 3\)"),
        (lambda x: kolchinsky_tracey_bounds(x, 0 * x), "must all be above 0"),
        (lambda x: kolchinsky_tracey_bounds(x, torch.tensor(torch.nan)), "must all be above 0"),
        (lambda x: kolchinsky_tracey_bounds(x, x, x), r"weights are \(4, 3\).*one per component: \(4,\)"),
        (lambda x: kolchinsky_tracey_bounds(x, x, [1, 1]), "weights are list"),
        (lambda x: kolchinsky_tracey_bounds(x, x, torch.tensor([1.0, 1, 1, -1])), "none below 0"),
        (lambda x: kolchinsky_tracey_bounds(x, x, torch.zeros(4)), "not all 0"),
        (lambda x: kolchinsky_tracey_bounds(1j * x, x), "real tensors, got torch.complex64"),
        (lambda x: info_nce_bound(x, x, x[:2]), r"samples have shape \(2, 3\) and means \(4, 3\)"),
        (lambda x: leave_one_out_bound(x[:1], x[:1], x[:1]), "two or more"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(torch.ones(4, 3))
    assert isinstance(caught.value, TdprobeError)
