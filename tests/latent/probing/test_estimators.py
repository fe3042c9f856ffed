from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from tdprobe.errors import TdprobeError
from tdprobe.latent import BilinearEstimator, LinearEstimator, LowRankBilinearEstimator, TorchEstimator


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


X = draw(256, 4)
TRUTH = torch.tensor([[2.0], [-1.0], [0.5], [0.0]])
NOISY = X @ TRUTH + 3 + 0.3 * draw(256, 1, seed=1)
CLASSES = (NOISY[:, 0] > 3).long()


def linear(**options: Any) -> LinearEstimator:
    torch.manual_seed(0)
    return LinearEstimator(4, **({"epochs": 60, "lr": 0.05} | options))


FRESH = linear()


def state_of(estimator: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in estimator.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_linear_regression_ends_at_least_squares() -> None:
    estimator = linear(epochs=600, batch_size=256).fit(X, y=NOISY)
    design = torch.cat([X, torch.ones(256, 1)], 1).double()
    best = torch.linalg.lstsq(design, NOISY.double()).solution[:, 0]
    found = torch.cat([estimator.linear.weight[0], estimator.linear.bias])
    torch.testing.assert_close(found.double(), best, atol=1e-4, rtol=0)
    torch.testing.assert_close(estimator.predict(X).double(), design @ best[:, None], atol=1e-3, rtol=0)


def test_a_linear_classifier_ends_at_the_maximum_of_the_likelihood() -> None:
    estimator = linear(epochs=1500, batch_size=256, num_classes=2).fit(X, y=CLASSES)
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(X.numpy(), CLASSES.numpy())
    weight, bias = estimator.linear.weight.detach(), estimator.linear.bias.detach()
    np.testing.assert_allclose(weight[1] - weight[0], reference.coef_[0], rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(bias[1] - bias[0], reference.intercept_[0], rtol=5e-3)
    assert torch.equal(estimator.predict(X), torch.as_tensor(reference.predict(X.numpy())))


def test_separable_classes_are_told_apart_without_an_error() -> None:
    centres = 6 * torch.eye(3, 4)
    labels = torch.arange(3).repeat(40)
    rows = centres[labels] + 0.3 * draw(120, 4)
    assert torch.equal(linear(num_classes=3).fit(rows, y=labels).predict(rows), labels)


def test_bilinear_formulas() -> None:
    h1, h2 = draw(5, 3, seed=2), draw(5, 4, seed=3)
    full = BilinearEstimator(3, 4, num_classes=2)
    form = torch.einsum("ni,kij,nj->nk", h1, full.bilinear.weight, h2) + full.bilinear.bias
    torch.testing.assert_close(full(h1, h2), form)
    low = LowRankBilinearEstimator(3, 4, num_classes=2)
    nn.init.constant_(low.bias, 0.7)
    first, second = low.linear1, low.linear2
    rank_one = (h1 @ first.weight.T + first.bias) * (h2 @ second.weight.T + second.bias) + 0.7
    torch.testing.assert_close(low(h1, h2), rank_one)


def test_without_bias_a_low_rank_probe_keeps_the_offsets_of_its_factors() -> None:
    low = LowRankBilinearEstimator(3, 4, bias=False)
    assert {name: tuple(p.shape) for name, p in low.named_parameters()} == {
        "linear1.weight": (1, 3),
        "linear1.bias": (1,),
        "linear2.weight": (1, 4),
        "linear2.bias": (1,),
    }
    assert BilinearEstimator(3, 4, bias=False).bilinear.bias is None
    assert LinearEstimator(3, bias=False).linear.bias is None


def test_a_product_is_learnt_by_both_bilinear_probes() -> None:
    h1, h2 = draw(512, 3, seed=4), draw(512, 3, seed=5)
    target = (h1[:, 0] * h2[:, 1]).unsqueeze(1)
    torch.manual_seed(0)
    full = BilinearEstimator(3, 3, epochs=200, lr=0.05).fit(h1, h2, y=target)
    expected = torch.zeros(3, 3)
    expected[0, 1] = 1
    torch.testing.assert_close(full.bilinear.weight[0].detach(), expected, atol=1e-3, rtol=0)
    low = LowRankBilinearEstimator(3, 3, epochs=300, lr=0.02).fit(h1, h2, y=target)
    assert (low.predict(h1, h2) - target).square().mean() < 1e-4 * target.var()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_fitting_does_not_depend_on_the_mode_around_it(mode: Any) -> None:
    plain = linear().fit(X, y=NOISY)
    with mode():
        rows, target = X * 1, NOISY * 1
        found = linear().fit(rows, y=target)
        prediction = found.predict(rows)
    assert same(state_of(plain), state_of(found))
    assert torch.equal(prediction, plain.predict(X)) and not prediction.is_inference()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_inputs_of_any_dtype_are_computed_in_float32(dtype: torch.dtype) -> None:
    rows = (3 * X).to(dtype)
    plain, other = linear().fit(rows.float(), y=NOISY), linear().fit(rows, y=NOISY.to(torch.float64))
    assert same(state_of(plain), state_of(other))
    assert other.predict(rows).dtype == torch.float32


def test_a_double_estimator_computes_in_double() -> None:
    estimator = linear().double().fit(X, y=NOISY)
    assert estimator.predict(X).dtype == torch.float64


def test_the_seed_decides_and_fitting_leaves_the_random_state() -> None:
    one, two = linear().fit(X, y=NOISY), linear().fit(X, y=NOISY)
    assert same(state_of(one), state_of(two))
    torch.manual_seed(1)
    other = copy.deepcopy(FRESH)
    before = torch.get_rng_state()
    other.fit(X, y=NOISY)
    assert torch.equal(torch.get_rng_state(), before)
    # The same first weights in another order of batches.
    assert not same(state_of(one), state_of(other))


def test_fit_goes_on_from_the_weights_and_returns_the_estimator() -> None:
    estimator = linear(epochs=5)
    with torch.no_grad():
        estimator.linear.weight.copy_(TRUTH.T)
        estimator.linear.bias.fill_(3)
    before = state_of(estimator)
    assert estimator.fit(X, y=X @ TRUTH + 3) is estimator
    for old, new in zip(before, state_of(estimator), strict=True):
        # At the optimum only rounding is left; Adam steps by at most lr, whatever the size of a gradient.
        torch.testing.assert_close(new, old, atol=0.05, rtol=0)
    assert not estimator.predict(X).requires_grad
    assert not estimator.training


def test_ignored_labels_do_not_count() -> None:
    labels = CLASSES.clone()
    labels[128:] = -100
    half = linear(num_classes=2, batch_size=256).fit(X[:128], y=CLASSES[:128])
    masked = linear(num_classes=2, batch_size=256).fit(X, y=labels)
    for a, b in zip(state_of(half), state_of(masked), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_labels_for_every_token_fit_outputs_for_every_token() -> None:
    tokens, labels = X.reshape(64, 4, 4), CLASSES.reshape(64, 4)
    whole = linear(num_classes=2, batch_size=64).fit(tokens, y=labels)
    flat = linear(num_classes=2, batch_size=256).fit(X, y=CLASSES)
    for a, b in zip(state_of(whole), state_of(flat), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert torch.equal(whole.predict(tokens), whole.predict(X).reshape(64, 4))


@pytest.mark.parametrize(
    ("options", "inputs", "labels", "problem"),
    [
        ({}, (X,), NOISY[:, 0], r"\(128, 1\), y has \(128,\).*unsqueeze"),
        ({"num_classes": 2}, (X,), CLASSES[:, None], r"y has \(128, 1\)"),
        ({"num_classes": 2}, (X,), CLASSES + 1, "0 to 1 .*got 2"),
        ({"num_classes": 2}, (X,), NOISY[:, 0], "got y of torch.float32"),
        ({"num_classes": 2}, (X,), CLASSES[:9], "256 rows and 9 labels"),
        ({"num_classes": 2}, (X[:0],), CLASSES[:0], "at least one"),
        ({}, (X, X), NOISY, "reads one activation, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(options: Any, inputs: Any, labels: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        linear(**options).fit(*inputs, y=labels)
    assert isinstance(caught.value, TdprobeError)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"lr": -1.0}, {"batch_size": 0}, {"num_classes": 0}])
def test_a_number_that_is_not_positive_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} of LinearEstimator must be more than 0"):
        LinearEstimator(4, **options)


def test_y_is_given_by_name() -> None:
    with pytest.raises(TypeError):
        linear().fit(X, NOISY)


def test_nan_is_named() -> None:
    rows = X.clone()
    rows[3, 1] = torch.nan
    with pytest.warns(UserWarning, match="LinearEstimator ended with NaN"):
        linear(epochs=1).fit(rows, y=NOISY)


def test_a_subclass_says_what_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    class Scale(TorchEstimator):
        def __init__(self) -> None:
            super().__init__(epochs=300, lr=0.05, verbose=True)
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x

    assert Scale().fit(X, y=-2 * X).factor.item() == pytest.approx(-2, abs=1e-3)
    assert "Scale" in capsys.readouterr().err
