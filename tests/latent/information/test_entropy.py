"""Entropy and mutual information: against the definition, their parts, their masks, their gradients."""

from __future__ import annotations

import inspect
import math
from collections import UserDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from information_tools import (
    ASSIGNMENT,
    ENTROPY,
    LOG_CONSTANTS,
    MAHALANOBIS,
    MUTUAL_INFORMATION,
    STD_LOG,
    batch,
    entropy_by_definition,
    information_by_definition,
)
from tdprobe.latent.information.entropy import (
    gaussian_mixture_entropy,
    mutual_information_sub_batch,
    square_mahalanobis_distance,
)

OPTIONS = [(estimator, method) for estimator in ("pairwise", "mixture") for method in ("loop", "matmul")]
EXACT = {"rtol": 0, "atol": 1e-12}
seeds = st.integers(0, 10_000)
few = settings(max_examples=15, deadline=None)


def mixture(size=5, n=3, **options):
    """Return clean, transformed, means, stds and mask with b = 5 points and n = 3 components."""
    means, stds, mask, clean, noisy = batch(size + n, **options)
    return clean[size:], noisy[:size], means[size:], stds[size:], mask[:size]


def test_names_order_and_defaults_are_those_of_the_page():
    def told(function):
        parameters = inspect.signature(function).parameters.values()
        plain = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        return [p.name for p in plain], {p.name: p.default for p in plain if p.default is not p.empty}

    embeddings = ["clean_embeddings", "transformed_embeddings", "means", "stds", "mask"]
    assert told(gaussian_mixture_entropy) == ([*embeddings, "losses"], {"losses": None})
    assert told(square_mahalanobis_distance) == (["x", "y", "stds", "mask"], {})
    given = ["means_tensor", "stds_tensor", "noise_mask", "clean_input_embeddings", "noisy_input_embeddings"]
    combine = "combine_noise_masks_for_mutual_information_sub_batches"
    assert told(mutual_information_sub_batch) == ([*given, combine, "losses"], {combine: True, "losses": None})


# Values.


@pytest.mark.parametrize(("estimator", "method"), OPTIONS)
def test_entropy_is_the_definition(estimator, method):
    clean, y, means, stds, mask = mixture()
    found = gaussian_mixture_entropy(clean, y, means, stds, mask, estimator=estimator, method=method)
    keep = mask[:, None].expand(5, 3, 4)
    torch.testing.assert_close(found, entropy_by_definition(clean, y, means, stds, keep, estimator == "mixture"))


@pytest.mark.parametrize(("estimator", "method"), OPTIONS)
def test_a_mask_of_pairs_leaves_out_single_triples(estimator, method):
    clean, y, means, stds, _ = mixture()
    keep = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    found = gaussian_mixture_entropy(clean, y, means, stds, keep, estimator=estimator, method=method)
    torch.testing.assert_close(found, entropy_by_definition(clean, y, means, stds, keep, estimator == "mixture"))


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize(("estimator", "method"), OPTIONS)
def test_information_is_the_definition(estimator, method, combine):
    given = batch()
    found = mutual_information_sub_batch(*given, combine, estimator=estimator, method=method)
    torch.testing.assert_close(found, information_by_definition(given, combine, estimator == "mixture"))


def test_information_is_half_the_printed_formula_less_half_the_width():
    means, stds, _, clean, noisy = given = batch()
    full = torch.ones(6, 4)
    terms = []
    for i in range(3):
        for k in range(3, 6):
            distance = ((noisy[i] - clean[k] - means[k]) ** 2 / stds[k] ** 2).sum(-1)
            terms.append((stds[k] ** 2).log().sum(-1) - (stds[i] ** 2).log().sum(-1) + distance)
    printed = torch.stack(terms).mean()
    found = mutual_information_sub_batch(given[0], given[1], full, clean, noisy)
    torch.testing.assert_close(found, printed / 2 - 3 / 2)


def test_symmetric_averages_both_ways():
    given, turned = batch(), [x.roll(3, 0) for x in batch()]
    parts, one, other = {}, {}, {}
    both = mutual_information_sub_batch(*given, losses=parts, symmetric=True)
    there, back = (mutual_information_sub_batch(*g, losses=p) for g, p in ((given, one), (turned, other)))
    torch.testing.assert_close(both, (there + back) / 2, **EXACT)
    for name, value in parts.items():
        torch.testing.assert_close(value, (one[name] + other[name]) / 2, **EXACT)


def test_sampled_conditional_is_the_density_of_the_own_component():
    means, stds, mask, clean, noisy = given = batch()
    parts = {}
    mutual_information_sub_batch(*given, False, parts, conditional="sampled")
    own = torch.distributions.Normal(clean + means, stds).log_prob(noisy).sum(-1)[:3]
    torch.testing.assert_close(parts[STD_LOG], own[mask[:3]].mean())


# Parts.


@pytest.mark.parametrize(("estimator", "method"), OPTIONS)
@pytest.mark.parametrize("conditional", ["analytic", "sampled"])
@few
@given(seed=seeds)
def test_parts_add_up(estimator, method, conditional, seed):
    parts = {}
    options = {"estimator": estimator, "method": method, "conditional": conditional}
    found = mutual_information_sub_batch(*batch(seed=seed), losses=parts, **options)
    inner = {MAHALANOBIS, LOG_CONSTANTS} | ({ASSIGNMENT} if estimator == "mixture" else set())
    assert parts.keys() == inner | {ENTROPY, STD_LOG, MUTUAL_INFORMATION}
    torch.testing.assert_close(sum(parts[name] for name in inner), parts[ENTROPY], **EXACT)
    torch.testing.assert_close(parts[ENTROPY] + parts[STD_LOG], found, **EXACT)
    assert torch.equal(parts[MUTUAL_INFORMATION], found)


@few
@given(seed=seeds, n=st.integers(1, 6))
def test_the_mixture_is_tighter_and_tells_what_is_assigned(seed, n):
    clean, y, means, stds, _ = mixture(5, n, seed=seed)
    parts, full = {}, torch.ones(5, 4)
    pairwise = gaussian_mixture_entropy(clean, y, means, stds, full)
    tight = gaussian_mixture_entropy(clean, y, means, stds, full, parts, estimator="mixture")
    assert tight <= pairwise + 1e-12
    assert -1e-12 <= parts[ASSIGNMENT] <= math.log(n) + 1e-12


@few
@given(seed=seeds)
def test_two_rows_leave_one_component_so_that_both_estimators_agree(seed):
    means, stds, _, clean, noisy = batch(2, seed=seed)
    found = [mutual_information_sub_batch(means, stds, torch.ones(2, 4), clean, noisy, estimator=e) for e, _ in OPTIONS]
    torch.testing.assert_close(found[0], found[2], **EXACT)


@pytest.mark.parametrize("kind", [dict, UserDict, lambda: TensorDict({}, batch_size=[])])
def test_losses_are_written_over_what_is_there_with_their_graph(kind):
    means, stds, mask, clean, noisy = batch()
    stds.requires_grad_()
    losses = kind()
    losses[ENTROPY], losses["other"] = torch.tensor(7.0), torch.tensor(3.0)
    found = mutual_information_sub_batch(means, stds, mask, clean, noisy, losses=losses)
    assert losses["other"] == 3
    whole, parts = (torch.autograd.grad(x, stds, retain_graph=True)[0] for x in (found, losses[ENTROPY]))
    (rest,) = torch.autograd.grad(losses[STD_LOG], stds)
    torch.testing.assert_close(parts + rest, whole)


# Invariances.


@few
@given(seed=seeds, shift=st.floats(-50, 50), scale=st.floats(0.1, 10))
def test_shifts_change_nothing_and_scales_add_their_logarithm(seed, shift, scale):
    means, stds, mask, clean, noisy = given = batch(seed=seed)
    plain = mutual_information_sub_batch(*given)
    shifted = mutual_information_sub_batch(means, stds, mask, clean + shift, noisy + shift)
    torch.testing.assert_close(shifted, plain, rtol=1e-10, atol=1e-10)
    scaled = mutual_information_sub_batch(scale * means, scale * stds, mask, scale * clean, scale * noisy)
    torch.testing.assert_close(scaled, plain, rtol=1e-10, atol=1e-10)
    x, y, mu, sigma, keep = mixture(seed=seed)
    entropy = gaussian_mixture_entropy(x, y, mu, sigma, keep)
    scaled = gaussian_mixture_entropy(scale * x, scale * y, scale * mu, scale * sigma, keep)
    torch.testing.assert_close(scaled, entropy + 3 * math.log(scale), rtol=1e-10, atol=1e-10)
    shifted = gaussian_mixture_entropy(x + shift, y + shift, mu, sigma, keep)
    torch.testing.assert_close(shifted, entropy, rtol=1e-10, atol=1e-10)


@few
@given(seed=seeds, data=st.data())
def test_order_within_halves_and_of_tokens_does_not_matter(seed, data):
    given = batch(seed=seed)
    rows = [*data.draw(st.permutations(range(3))), *data.draw(st.permutations(range(3, 6)))]
    tokens = data.draw(st.permutations(range(4)))
    for estimator in ("pairwise", "mixture"):
        mixed = mutual_information_sub_batch(*(x[rows][:, tokens] for x in given), estimator=estimator)
        torch.testing.assert_close(mixed, mutual_information_sub_batch(*given, estimator=estimator))


# Masks.


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0, 1e30])
@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize(("estimator", "method"), OPTIONS)
@pytest.mark.parametrize("conditional", ["analytic", "sampled"])
def test_garbage_at_masked_positions_changes_neither_value_nor_gradient(bad, combine, estimator, method, conditional):
    given = batch()
    means, stds, mask, clean, noisy = given
    hole = ~mask
    # Without combining, a component counts wherever the point does.
    hole[3:] &= torch.tensor(combine)
    results = []
    for value in (1.0, bad):
        leaves = [x.masked_fill(hole[..., None], value).requires_grad_() for x in (means, stds, clean, noisy)]
        options = {"estimator": estimator, "method": method, "conditional": conditional}
        found = mutual_information_sub_batch(leaves[0], leaves[1], mask, *leaves[2:], combine, **options)
        found.backward()
        results.append([found.detach(), *(x.grad if x.grad is not None else torch.zeros(1) for x in leaves)])
    for fine, odd in zip(*results, strict=True):
        assert torch.equal(fine, odd) and bool(odd.isfinite().all())


@pytest.mark.parametrize(("estimator", "method"), OPTIONS)
def test_garbage_that_no_pair_uses_changes_nothing(estimator, method):
    clean, y, means, stds, _ = mixture()
    keep = torch.ones(5, 3, 4)
    # One component is used by no point, and one point uses no component.
    keep[:, 1, 2], keep[4, :, 0] = 0, 0
    results = []
    for bad in (1.0, torch.nan):
        leaves = [x.clone() for x in (clean, y, means, stds)]
        for x in (leaves[0], leaves[2], leaves[3]):
            x[1, 2] = bad
        leaves[1][4, 0] = bad
        for x in leaves:
            x.requires_grad_()
        found = gaussian_mixture_entropy(*leaves, keep, estimator=estimator, method=method)
        results.append([found, *torch.autograd.grad(found, leaves)])
    assert all(torch.equal(fine, odd) and bool(odd.isfinite().all()) for fine, odd in zip(*results, strict=True))


def test_appended_padding_changes_nothing():
    given = batch()
    padded = [torch.cat([x, torch.zeros_like(x[:, :2])], 1) for x in given]
    for estimator, method in OPTIONS:
        options = {"estimator": estimator, "method": method}
        found = mutual_information_sub_batch(*padded, **options)
        torch.testing.assert_close(found, mutual_information_sub_batch(*given, **options), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_any_nonzero_mask_value_keeps(dtype):
    means, stds, mask, clean, noisy = given = batch()
    numbers = (mask.to(dtype) * (1 if dtype == torch.bool else -3)).to(dtype)
    assert torch.equal(
        mutual_information_sub_batch(means, stds, numbers, clean, noisy), mutual_information_sub_batch(*given)
    )


@pytest.mark.parametrize(("estimator", "method"), OPTIONS)
def test_an_empty_mask_is_zero_with_a_live_graph(estimator, method):
    means, stds, mask, clean, noisy = (x.clone() for x in batch())
    leaves = [x.fill_(torch.nan).requires_grad_() for x in (means, stds, clean, noisy)]
    for conditional in ("analytic", "sampled"):
        losses = {}
        options = {"estimator": estimator, "method": method, "conditional": conditional, "losses": losses}
        found = mutual_information_sub_batch(leaves[0], leaves[1], mask & False, *leaves[2:], **options)
        assert found == 0 and all(value == 0 for value in losses.values())
        grads = torch.autograd.grad(found, leaves[:2], allow_unused=True)
        assert all(g is None or bool((g == 0).all()) for g in grads) and grads[1] is not None
    distance = square_mahalanobis_distance(leaves[2], leaves[3], leaves[1], mask & False)
    assert distance == 0 and distance.grad_fn is not None


def test_no_tokens_no_points_and_no_features_are_zero():
    zero = torch.zeros(2, 0, 3)
    assert mutual_information_sub_batch(zero, zero, torch.ones(2, 0), zero, zero) == 0
    flat = torch.zeros(2, 5, 0)
    for estimator, method in OPTIONS:
        options = {"estimator": estimator, "method": method}
        assert mutual_information_sub_batch(flat, flat, torch.ones(2, 5), flat, flat, **options).abs() < 1e-6
        points = torch.zeros(0, 4, 3)
        x = torch.ones(2, 4, 3)
        assert gaussian_mixture_entropy(x, points, x, x, torch.ones(0, 4), **options) == 0


# Mahalanobis.


def test_mahalanobis_is_half_the_square_in_units_of_std():
    x, y = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([0.0, 1.0])
    per_token = [0.5 * (1 / 4 + 1 / 9), 0.5 * (9 / 4 + 16 / 9)]
    stds = torch.tensor([2.0, 3.0])
    for mask, kept in (([1, 1], per_token), ([0, 1], per_token[1:])):
        mask = torch.tensor(mask)
        assert square_mahalanobis_distance(x, y, stds, mask).item() == pytest.approx(sum(kept) / len(kept))
        total = square_mahalanobis_distance(x, y, stds, mask, reduction="sum")
        assert total.item() == pytest.approx(sum(kept))
    found = square_mahalanobis_distance(x, y, stds, torch.tensor([0, 1]), reduction="none")
    assert found.tolist() == pytest.approx([0, per_token[1]])


def test_mahalanobis_broadcasts_all_pairs():
    clean, y, means, stds, mask = mixture()
    parts = {}
    gaussian_mixture_entropy(clean, y, means, stds, mask, parts)
    found = square_mahalanobis_distance((clean + means)[None], y[:, None], stds[None], mask[:, None])
    torch.testing.assert_close(found, parts[MAHALANOBIS])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_mahalanobis_ignores_garbage_where_masked(bad):
    x = torch.ones(2, 3, 2, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    leaves = [x.masked_fill(mask[..., None] == 0, v).requires_grad_() for v in (bad, bad, 0.0)]
    found = square_mahalanobis_distance(2 * leaves[0], leaves[1], leaves[2], mask)
    assert found == 1
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(found, leaves))
