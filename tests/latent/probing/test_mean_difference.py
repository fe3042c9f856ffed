from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.neighbors import NearestCentroid

from tdprobe.latent import MeanDifferenceClassifier

RNG = np.random.default_rng(0)
Y = RNG.integers(0, 2, 60)
X = RNG.normal(size=(60, 5)) + Y[:, None] * [1.0, 0.5, 0, 0, -1]


def fitted(x: np.ndarray, y: np.ndarray, normalize: bool = True) -> MeanDifferenceClassifier:
    classifier = MeanDifferenceClassifier(normalize)
    assert classifier.fit(x, y) is None
    return classifier


def test_the_formula() -> None:
    one, zero = X[Y == 1].mean(0), X[Y == 0].mean(0)
    raw = fitted(X, Y, normalize=False)
    np.testing.assert_allclose(raw.coef_, [one - zero])
    np.testing.assert_allclose(raw.intercept_, [-(one @ one - zero @ zero) / 2])
    unit = fitted(X, Y)
    length = np.linalg.norm(one - zero)
    np.testing.assert_allclose(unit.coef_, raw.coef_ / length)
    np.testing.assert_allclose(unit.intercept_, raw.intercept_ / length)
    assert unit.coef_.shape == (1, 5) and unit.intercept_.shape == (1,)


@pytest.mark.parametrize("normalize", [True, False])
def test_it_decides_as_the_nearest_centroid(normalize: bool) -> None:
    new = RNG.normal(size=(500, 5))
    reference = NearestCentroid().fit(X, Y).predict(new)
    found = fitted(X, Y, normalize).predict(new)
    assert found.dtype == bool
    assert np.array_equal(found, reference == 1)


def test_probabilities_are_logistic_and_do_not_overflow() -> None:
    classifier = fitted(X, Y, normalize=False)
    decision = X @ classifier.coef_[0] + classifier.intercept_
    expected = 1 / (1 + np.exp(-decision))
    np.testing.assert_allclose(classifier.predict_proba(X), np.stack([1 - expected, expected], 1))
    with np.errstate(all="raise"):
        assert classifier.predict_proba(1e6 * X).max() == 1


@given(
    rows=hnp.arrays(np.float64, (12, 3), elements=st.floats(-100, 100)),
    shift=hnp.arrays(np.float64, 3, elements=st.floats(-1000, 1000)),
)
def test_a_shift_of_the_data_shifts_the_decision_with_it(rows: np.ndarray, shift: np.ndarray) -> None:
    labels = np.arange(12) % 2
    raw, moved = fitted(rows, labels, False), fitted(rows + shift, labels, False)
    decision = rows @ raw.coef_[0] + raw.intercept_
    again = (rows + shift) @ moved.coef_[0] + moved.intercept_
    np.testing.assert_allclose(again, decision, atol=1e-6 * (1 + np.abs(decision).max()))


def test_far_from_the_origin_the_intercept_keeps_its_digits() -> None:
    near, far = fitted(X, Y), fitted(X + 1e7, Y)
    assert np.array_equal(near.predict(X), far.predict(X + 1e7))


def test_equal_means_are_not_divided_by_zero() -> None:
    classifier = fitted(np.ones((4, 2)), np.array([0, 1, 0, 1]))
    assert np.array_equal(classifier.coef_, [[0.0, 0.0]]) and classifier.intercept_ == 0
    assert not classifier.predict(np.ones((1, 2))).any()


def test_half_a_label_shares_a_row() -> None:
    shared = fitted(np.array([[0.0], [2.0], [4.0]]), np.array([0, 0.5, 1]), normalize=False)
    # mean_1 = (2 / 2 + 4) / 1.5, mean_0 = (2 / 2) / 1.5
    np.testing.assert_allclose(shared.coef_, [[5 / 1.5 - 1 / 1.5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_of_any_dtype_give_tensors(dtype: torch.dtype) -> None:
    rows, labels = torch.as_tensor(X).to(dtype), torch.as_tensor(Y)
    classifier = MeanDifferenceClassifier()
    classifier.fit(rows, labels)
    reference = fitted(rows.double().numpy(), Y)
    np.testing.assert_allclose(classifier.coef_, reference.coef_)
    found = classifier.predict(rows)
    assert found.dtype == torch.bool and np.array_equal(found, reference.predict(rows.double().numpy()))


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (np.zeros((60, 1)), "shape"),
        (np.zeros(60), "both classes"),
        (np.ones(60), "both classes"),
        (np.zeros(59), "60 rows and 59 labels"),
        (2 * Y - 1, "labels are 0 and 1, got -1"),
        (np.full(60, np.nan), "labels are 0 and 1, got nan"),
    ],
)
def test_labels_that_are_not_two_classes_are_refused(labels: np.ndarray, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        fitted(X, labels)


def test_an_unfitted_classifier_says_so() -> None:
    classifier = MeanDifferenceClassifier()
    for use in (lambda: classifier.coef_, lambda: classifier.intercept_, lambda: classifier.predict(X)):
        with pytest.raises(ValueError, match="not fitted"):
            use()
