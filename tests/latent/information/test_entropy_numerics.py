"""Entropy and mutual information: closed forms, known channels, gradients, dtypes, errors."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from information_tools import ENTROPY, MAHALANOBIS, STD_LOG, batch
from tdprobe.errors import TdprobeError
from tdprobe.latent.information.entropy import (
    gaussian_mixture_entropy,
    mutual_information_sub_batch,
    square_mahalanobis_distance,
)

OPTIONS = [(estimator, method) for estimator in ("pairwise", "mixture") for method in ("loop", "matmul")]


def quantiles(mean: float, std: float, n: int = 20_000) -> Tensor:
    """Return points that stand for a Gaussian better than drawn ones: the middles of n equally likely slices."""
    middles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return mean + std * torch.special.ndtri(middles)


def mixture_1d(means: list[float], stds: list[float], estimator: str) -> float:
    """Return the entropy of an equally weighted mixture in one dimension."""
    y = torch.cat([quantiles(m, s) for m, s in zip(means, stds, strict=True)])[:, None, None]
    mu, sigma = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (means, stds))
    zero = torch.zeros_like(mu)
    return gaussian_mixture_entropy(mu, y, zero, sigma, torch.ones(len(y), 1), estimator=estimator).item()


@pytest.mark.parametrize(
    ("std", "estimator"), [(1.0, "pairwise"), (1.0, "mixture"), (0.01, "pairwise"), (30.0, "mixture")]
)
def test_the_entropy_of_a_gaussian(std, estimator):
    expected = 0.5 * math.log(2 * math.pi * math.e) + math.log(std)
    assert mixture_1d([4.0], [std], estimator) == pytest.approx(expected, abs=1e-3)


def test_the_entropy_of_a_mixture_and_of_its_components():
    # .5 N(-1.5, .6^2) + .5 N(1.5, 1.1^2), integrated to twelve digits elsewhere.
    assert mixture_1d([-1.5, 1.5], [0.6, 1.1], "mixture") == pytest.approx(1.802327535575, abs=1e-3)
    assert mixture_1d([-1.5, 1.5], [0.6, 1.1], "pairwise") == pytest.approx(5.473261848873, abs=3e-3)


@pytest.mark.parametrize(
    ("distance", "entropy"),
    [(1, 1.530360015388), (2, 1.755769353547), (4, 2.051658726932), (10, 2.112084850598)],
)
def test_two_unit_gaussians_apart(distance, entropy):
    assert mixture_1d([0.0, float(distance)], [1.0, 1.0], "mixture") == pytest.approx(entropy, abs=1e-3)


@pytest.mark.parametrize(
    ("means", "stds", "information"),
    [
        ([-1.5, 1.5], [0.6, 1.1], 0.591146724351),
        ([0.0, 1.0], [1.0, 1.0], 0.111421482183),
        ([0.0, 2.0], [1.0, 1.0], 0.336830820343),
        ([0.0, 4.0], [1.0, 1.0], 0.632720193728),
        ([0.0, 10.0], [1.0, 1.0], 0.693146317393),
    ],
)
def test_what_points_tell_about_their_component(means, stds, information):
    # Both halves hold both components; tokens are the points of each.
    given = list(zip(means, stds, strict=True))
    y = torch.stack([quantiles(mean, std) for mean, std in given]).repeat(2, 1)[..., None]
    mu, sigma = (torch.tensor(x, dtype=torch.float64).repeat(2)[:, None, None].expand_as(y) for x in (means, stds))
    parts = {}
    options = {"estimator": "mixture", "losses": parts}
    found = mutual_information_sub_batch(0 * mu, sigma, torch.ones(y.shape[:2]), mu, y, **options)
    assert found.item() == pytest.approx(information, abs=1e-3)
    own = sum(math.log(std) for std in stds) / 2 + 0.5 * math.log(2 * math.pi * math.e)
    assert parts[STD_LOG].item() == pytest.approx(-own, abs=1e-12)
    if means == [-1.5, 1.5]:
        assert own == pytest.approx(1.211180811224, abs=1e-12)


@pytest.mark.parametrize("snr", [0.01, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("conditional", ["analytic", "sampled"])
def test_a_gaussian_channel_has_its_snr_per_dimension(snr, conditional):
    # The pairwise value is an upper bound whose expectation is I plus the lautum information: exactly the snr.
    size, tokens, g = 8, 2000, torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, size, tokens, 1, generator=g, dtype=torch.float64)
    std = torch.full_like(x, snr**-0.5)
    zero = torch.zeros_like(x)
    values = []
    for t in range(0, tokens, 100):
        part = slice(t, t + 100)
        given = (zero[:, part], std[:, part], torch.ones(size, 100), x[:, part], (x + std * noise)[:, part])
        values.append(mutual_information_sub_batch(*given, conditional=conditional))
    values = torch.stack(values)
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - snr) < 4 * error
    # Not the information itself, which is smaller; and not bounded by the logarithm of the components.
    assert snr < 1 or values.mean() - 4 * error > 0.5 * math.log(1 + snr)
    assert snr < 10 or values.mean() > math.log(size)


def test_the_mixture_approaches_the_information_of_the_channel_from_above():
    size, tokens, g = 128, 400, torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, size, tokens, 1, generator=g, dtype=torch.float64)
    std, full = torch.ones_like(x), torch.ones(size, tokens)
    options = {"estimator": "mixture", "conditional": "sampled"}
    found = mutual_information_sub_batch(0 * x, std, full, x, x + noise, **options).item()
    pairwise = mutual_information_sub_batch(0 * x, std, full, x, x + noise, conditional="sampled").item()
    assert 0.5 * math.log(2) - 0.02 < found < 0.5 * math.log(2) + 0.06 < 0.5 * pairwise


# Gradients.


@pytest.mark.parametrize(("estimator", "method"), OPTIONS)
@pytest.mark.parametrize("conditional", ["analytic", "sampled"])
def test_gradients_are_those_of_finite_differences(estimator, method, conditional):
    means, stds, mask, clean, noisy = batch(4, 2, 2)
    leaves = [x.requires_grad_() for x in (means, stds, clean, noisy)]

    def value(means, stds, clean, noisy):
        options = {"estimator": estimator, "method": method, "conditional": conditional}
        return mutual_information_sub_batch(means, stds, mask, clean, noisy, **options)

    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


@pytest.mark.parametrize("estimator", ["pairwise", "mixture"])
def test_every_part_has_its_gradient(estimator):
    means, stds, mask, clean, noisy = batch(4, 2, 2)

    def parts(stds, noisy):
        found = {}
        mutual_information_sub_batch(means, stds, mask, clean, noisy, losses=found, estimator=estimator)
        return tuple(found.values())

    assert torch.autograd.gradcheck(parts, [stds.requires_grad_(), noisy.requires_grad_()])


def test_sampled_and_analytic_have_the_same_gradients_for_reparametrised_noise():
    means, stds, mask, clean, noisy = batch()
    noise = (noisy - clean - means) / stds
    found = []
    for conditional in ("analytic", "sampled"):
        leaves = [x.detach().clone().requires_grad_() for x in (means, stds, clean)]
        mu, sigma, x = leaves
        value = mutual_information_sub_batch(mu, sigma, mask, x, x + mu + sigma * noise, conditional=conditional)
        found.append(torch.autograd.grad(value, leaves))
    torch.testing.assert_close(*found)


def test_sampled_varies_less():
    values = {"analytic": [], "sampled": []}
    for seed in range(60):
        means, stds, _, clean, noisy = batch(8, 4, 3, seed=seed)
        stds = stds + 3
        noisy = clean + means + stds * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).double()
        for conditional, found in values.items():
            given = (0 * means, stds, torch.ones(8, 4), 0.1 * clean, noisy - 0.9 * clean - means)
            found.append(mutual_information_sub_batch(*given, conditional=conditional))
    spread = {name: torch.stack(found).std() for name, found in values.items()}
    assert spread["sampled"] < 0.5 * spread["analytic"]


@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_gradients_stay_finite_at_extreme_noise(size):
    means, stds, mask, clean, noisy = (x.float() if x.is_floating_point() else x for x in batch())
    for estimator, method in OPTIONS:
        sigma = (size * stds).requires_grad_()
        value = mutual_information_sub_batch(means, sigma, mask, clean, noisy, estimator=estimator, method=method)
        assert bool(value.isfinite()) and bool(torch.autograd.grad(value, sigma)[0].isfinite().all())


def test_functional_transforms_see_the_same_gradient():
    means, stds, mask, clean, noisy = batch()
    found = torch.func.grad(lambda s: mutual_information_sub_batch(means, s, mask, clean, noisy))(stds)
    stds.requires_grad_()
    expected = torch.autograd.grad(mutual_information_sub_batch(means, stds, mask, clean, noisy), stds)[0]
    torch.testing.assert_close(found, expected)


# Numbers.


def exact(given):
    return [x.double() if x.is_floating_point() else x for x in given]


@pytest.mark.parametrize("ratio", [1.0, 3e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("method", ["loop", "matmul"])
def test_float32_keeps_its_digits_for_near_pairs(ratio, method):
    g = torch.Generator().manual_seed(0)
    clean, means, noise = torch.randn(3, 8, 4, 64, generator=g)
    # Component k + 4 stands where point k was drawn from, and the mean of the noise is as small as its spread.
    clean[4:] = clean[:4]
    given = (ratio * means, torch.full_like(clean, ratio), torch.ones(8, 4), clean, clean + ratio * noise)
    parts, reference = {}, {}
    keep = torch.eye(4, dtype=torch.bool)[..., None].expand(4, 4, 4)
    near = (given[3][4:], given[4][:4], given[0][4:], given[1][4:], keep)
    gaussian_mixture_entropy(*near, parts, method=method)
    gaussian_mixture_entropy(*exact(near), reference)
    assert parts[MAHALANOBIS].item() == pytest.approx(
        reference[MAHALANOBIS].item(), rel=4e-7 if method == "loop" else 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("estimator", "method"), OPTIONS)
def test_half_precision_is_its_upcast(dtype, estimator, method):
    given = batch(dtype=dtype)
    wide = [x.float() if x.is_floating_point() else x for x in given]
    options = {"estimator": estimator, "method": method}
    found = mutual_information_sub_batch(*given, **options)
    assert found.dtype == torch.float32 and torch.equal(found, mutual_information_sub_batch(*wide, **options))
    means, stds, mask, clean, noisy = given
    stds = stds.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mutual_information_sub_batch(means, stds, mask, clean, noisy, **options), stds)
    assert grad.dtype == dtype and bool(grad.isfinite().all())


def test_a_large_half_precision_mask_is_counted_exactly():
    # 4097 is no bfloat16, and no sum of ones gets beyond 256 in one.
    x = torch.ones(1, 4097, 1, dtype=torch.bfloat16)
    assert square_mahalanobis_distance(x, 0 * x, x, x[..., 0]) == 0.5


def test_dtypes_are_promoted_and_autocast_left_outside():
    means, stds, mask, clean, noisy = given = batch(width=64)
    assert mutual_information_sub_batch(means.float(), stds, mask, clean, noisy).dtype == torch.float64
    narrow = [x.float() if x.is_floating_point() else x for x in given]
    for estimator, method in OPTIONS:
        plain = mutual_information_sub_batch(*narrow, estimator=estimator, method=method)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            assert torch.equal(mutual_information_sub_batch(*narrow, estimator=estimator, method=method), plain)


@pytest.mark.parametrize(("std", "check"), [(0.0, lambda x: not bool(x.isfinite())), (-1.0, Tensor.isnan)])
def test_stds_are_not_clamped_where_they_count(std, check):
    means, stds, mask, clean, noisy = batch()
    stds[4, 0, 1] = std
    assert check(mutual_information_sub_batch(means, stds, mask, clean, noisy))


@pytest.mark.parametrize("which", range(4))
def test_nan_where_it_counts_shows(which):
    given = list(batch())
    place = [0, 1, 3, 4][which]
    given[place][:, 0] = torch.nan
    parts = {}
    found = mutual_information_sub_batch(*given, losses=parts)
    assert found.isnan() and parts[ENTROPY].isnan() and bool(parts[STD_LOG].isnan()) == (place == 1)


def test_inputs_are_left_as_they_are():
    given = batch()
    copies = [x.clone() for x in given]
    for x in given:
        if x.is_floating_point():
            x.requires_grad_()
    for estimator, method in OPTIONS:
        mutual_information_sub_batch(*given, estimator=estimator, method=method).backward()
    assert all(torch.equal(x, y) for x, y in zip(given, copies, strict=True))


# Errors.


def replaced(place: int, value: Tensor) -> list[Tensor]:
    return [value if i == place else x for i, x in enumerate(batch())]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([x[:1] for x in batch()], "the batch has 1 rows.*even number of rows, 2 or more"),
        ([x[:0] for x in batch()], "the batch has 0 rows"),
        ([x[:5] for x in batch()], "the batch has 5 rows"),
        (replaced(4, torch.zeros(6, 4, 2)), r"noisy_input_embeddings has shape \(6, 4, 2\).*\(6, 4, 3\)"),
        (replaced(0, torch.zeros(3)), r"means_tensor has shape \(3,\).*expand_as"),
        (replaced(1, torch.zeros(6, 4, 1)), r"stds_tensor has shape \(6, 4, 1\)"),
        (replaced(2, torch.zeros(6, 4, 3)), r"noise_mask has shape \(6, 4, 3\).*must be \(6, 4\)"),
        (replaced(2, [1, 0]), "noise_mask is a tensor in which nonzero means keep, got list"),
        ([x[0] for x in batch()], r"clean_input_embeddings has shape \(4, 3\); it must be \(batch, tokens, features\)"),
        (replaced(3, torch.zeros(6, 4, 3, dtype=torch.complex64)), "real tensors, got torch.complex64"),
    ],
)
def test_information_refuses(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        mutual_information_sub_batch(*given)
    assert isinstance(caught.value, TdprobeError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "mixtures"}, "unknown estimator 'mixtures'; did you mean 'mixture'"),
        ({"conditional": "analytical"}, "unknown conditional 'analytical'; did you mean 'analytic'"),
        ({"method": "bmm"}, "unknown method 'bmm'.*loop, matmul"),
        ({"losses": [1]}, "losses is a dict or TensorDict to write into, got list"),
        ({"losses": TensorDict({}, batch_size=[6])}, r"losses has batch_size \(6,\), and scalars"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        mutual_information_sub_batch(*batch(), **options)


def test_entropy_and_distance_refuse():
    x, one = torch.ones(2, 4, 3), torch.ones(5, 4)
    y = torch.ones(5, 4, 3)
    with pytest.raises(ValueError, match=r"transformed_embeddings has shape \(5, 4, 2\) and clean.*\(2, 4, 3\)"):
        gaussian_mixture_entropy(x, y[..., :2], x, x, one)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\).*must be \(5, 4\) or \(5, 2, 4\)"):
        gaussian_mixture_entropy(x, y, x, x, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"means has shape \(2, 4\) and clean_embeddings \(2, 4, 3\)"):
        gaussian_mixture_entropy(x, y, x[..., 0], x, one)
    with pytest.raises(ValueError, match=r"stds has shape \(1, 4, 3\) and clean_embeddings \(2, 4, 3\)"):
        gaussian_mixture_entropy(x, y, x, x[:1], one)
    with pytest.raises(ValueError, match="batch of 0, so the mixture has no component"):
        gaussian_mixture_entropy(x[:0], y, x[:0], x[:0], one)
    with pytest.raises(ValueError, match=r"shapes \(2, 4, 3\), \(5, 4, 3\) and \(\), which do not broadcast"):
        square_mahalanobis_distance(x, y, torch.tensor(1.0), one)
    with pytest.raises(ValueError, match=r"mask has shape \(5, 3\); it must broadcast to \(5, 4\)"):
        square_mahalanobis_distance(y, y, y, one[:, :3])
    with pytest.raises(ValueError, match="unknown reduction 'median'"):
        square_mahalanobis_distance(y, y, y, one, reduction="median")
    with pytest.raises(ValueError, match="all scalars"):
        square_mahalanobis_distance(*torch.ones(4))
