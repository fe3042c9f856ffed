"""States of many estimators over one stream of rows: what is kept, what is left out, what survives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tdprobe.errors import ConfigError, StateError
from tdprobe.estimator import LayerEstimator, PairEstimator
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.representation_similarity import CkaEstimator, cka_matrix
from tdprobe.latent.score_blocks import Scored, score_blocks
from tdprobe.latent.scorer import Scorer
from tdprobe.registry import Spec
from tdprobe.stats.gram import Gram
from tdprobe.stats.moments import Moments
from tdprobe.stats.state import Statistic, layer_list
from tdprobe.stream.batch import Batch
from tdprobe.stream.tokens import tokens_text


def spec(kind: Any, name: str, symmetric: bool = True) -> Spec:
    return Spec(name, kind, symmetric, (0.0, 1.0), "larger", frozenset(), ("moments",), "n d", "none")


class TotalVariance(LayerEstimator):
    """Trace of the covariance of each layer."""

    spec = spec("layer", "total-variance")

    def __init__(self) -> None:
        super().__init__(["data"], ["variance"])

    def statistic(self) -> Statistic:
        return Moments()

    def score(self, state: Any) -> TensorDict:
        return TensorDict({"score": torch.stack([s.trace() for s in _scatters(state)]) / state.n})


class VarianceRatio(PairEstimator):
    """Variance of the first layer over that of the second."""

    spec = spec("pair", "variance-ratio", symmetric=False)

    def __init__(self) -> None:
        super().__init__(["data_a", "data_b"], ["ratio"])

    def statistic(self) -> Statistic:
        return Moments()

    def score(self, state: Any) -> TensorDict:
        total = torch.stack([s.trace() for s in _scatters(state)])
        return TensorDict({"score": total[:, None] / total[None, :]})


def _scatters(state: Any) -> list[torch.Tensor]:
    return layer_list(state.scatters)


def batch(n: int, seed: int = 0, start: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 3, generator=generator)
    noise = torch.randn(n, 5, generator=generator)
    return Batch({"a": common, "b": torch.cat([common, noise], 1), "c": noise}, torch.arange(start, start + n))


def exact(rows: dict[str, torch.Tensor]) -> np.ndarray:
    return cka_matrix([x.double() for x in rows.values()], unbiased=True).numpy()


def scorer(*estimators: Any, **options: Any) -> Scorer:
    # Rows of three columns vary more in length than those of a model, so only gross outliers are left out here.
    return Scorer(resolve_estimators(estimators or ["cka"]), **{"max_norm": 10.0} | options)


def test_names_and_objects_get_labels_of_their_own() -> None:
    one, two = CkaEstimator(), CkaEstimator(unbiased=True)
    found = resolve_estimators([one, "cka", two])
    assert list(found) == ["cka-2", "cka", "cka-3"]
    assert found["cka-2"] is one and found["cka-3"] is two
    assert found["cka"].minibatch and found["cka"].mode == "robust"
    assert list(resolve_estimators(["cka", "cka"])) == ["cka"]
    assert list(resolve_estimators(one)) == ["cka"] == list(resolve_estimators("cka"))
    assert resolve_estimators([CkaEstimator])["cka"].minibatch
    labelled = resolve_estimators({"biased": one, "by name": "cka"})
    assert labelled["biased"] is one and labelled["by name"].mode == "robust"


@pytest.mark.parametrize(
    ("estimators", "problem"),
    [
        ([], "estimators is empty; known ones: .*cka"),
        ("cak", "unknown estimator 'cak'; did you mean 'cka'"),
        (["cka", None], r"registry names \(.*cka.*\) or estimator objects; got None"),
        ([int], "got <class 'int'>"),
        (7, "got 7"),
        ({}, "from labels"),
        ({"": "cka"}, "from labels .strings. to estimators, got {'': 'cka'}"),
    ],
)
def test_what_is_no_estimator_is_refused(estimators: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        resolve_estimators(estimators)


def test_layer_and_pair_estimators_share_one_pass() -> None:
    scoring = scorer(TotalVariance(), VarianceRatio(), "cka", portion=10)
    whole = batch(47)
    for start in range(0, 47, 4):
        rows = {name: x[start : start + 4] for name, x in whole.rows.items()}
        scoring.push(Batch(rows, whole.ids[start : start + 4]))
    scores = scoring.scores()
    variance = torch.stack([x.double().var(0, correction=0).sum() for x in whole.rows.values()])
    torch.testing.assert_close(scores["total-variance"], variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores["variance-ratio"], variance[:, None] / variance[None, :], rtol=1e-5, atol=0)
    states = scoring.states()
    assert set(states) == {"total-variance", "variance-ratio", "cka"}
    assert states["total-variance"] is states["variance-ratio"]
    assert int(states["total-variance"].n) == 47 and int(states["cka"].batches) == 4


def test_outliers_leave_and_are_counted() -> None:
    rows = batch(100)
    for place in (3, 60, 99):
        rows.rows["c"][place] *= 1000
    scoring = scorer(portion=40)
    for start in range(0, 100, 10):
        part = {name: x[start : start + 10] for name, x in rows.rows.items()}
        scoring.push(Batch(part, rows.ids[start : start + 10]))
    keep = [place for place in range(100) if place not in (3, 60, 99)]
    assert scoring.n == 100 and scoring.n_dropped == 3
    assert int(scoring.states()["cka"].n) == 97
    assert scoring.facts() | {"estimators": None} == {
        "estimators": None,
        "rows": 100,
        "outliers": 3,
        "max_norm": 10.0,
        "rows_per_update": 40,
    }
    kept = {name: x[keep] for name, x in rows.rows.items()}
    # Portions are cut before outliers leave: rows 0 to 39, 40 to 79 and the rest.
    sums = sum(
        n * _hsic({name: x[start : start + n] for name, x in kept.items()})
        for start, n in ((0, 39), (39, 39), (78, 19))
    )
    wanted = sums / np.sqrt(np.outer(np.diag(sums), np.diag(sums)))
    np.testing.assert_allclose(scoring.scores()["cka"], wanted, atol=1e-4)


def _hsic(rows: dict[str, torch.Tensor]) -> np.ndarray:
    from tdprobe.stats.gram import gram_products

    return gram_products([x.double() for x in rows.values()]).numpy()


def test_a_last_portion_of_mostly_outliers_does_not_spoil_the_score() -> None:
    scoring = scorer(portion=32)
    scoring.push(batch(32))
    rest = batch(8, seed=1)
    # Different rows stand out in different layers, so few are left.
    for place in (0, 1, 2):
        rest.rows["a"][place] *= 1000
        rest.rows["c"][place + 3] *= 1000
    scoring.push(rest)
    assert scoring.n == 40 and scoring.n_dropped == 8
    np.testing.assert_allclose(scoring.scores()["cka"], exact(dict(batch(32).rows)), atol=1e-4)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("strike", [1, 2, 3])
def test_an_update_that_is_cut_short_loses_no_row(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], strike: int
) -> None:
    update, calls = Gram.update, []

    def failing(self: Gram, state: Any, rows: Any, ids: Any) -> Any:
        calls.append(1)
        if len(calls) == strike:
            raise error
        return update(self, state, rows, ids)

    parts = [batch(10, seed=seed) for seed in range(7)]
    smooth = scorer("cka", TotalVariance(), portion=16)
    for part in parts:
        smooth.push(part)
    monkeypatch.setattr(Gram, "update", failing)
    rough, struck = scorer("cka", TotalVariance(), portion=16), 0
    for part in parts:
        try:
            rough.push(part)
        except error:
            struck += 1
            assert rough.n % 10 == 0
    assert struck == 1 and rough.n == smooth.n == 70
    for label, wanted in smooth.scores().items():
        torch.testing.assert_close(rough.scores()[label], wanted, rtol=1e-12, atol=0)


def test_nothing_is_taken_from_a_batch_that_does_not_fit() -> None:
    scoring = scorer()
    scoring.push(batch(20))
    rows = dict(batch(20, seed=1).rows)
    for bad in ({"a": rows["a"]}, rows | {"a": rows["a"][:, :2]}, rows | {"d": rows["a"]}):
        with pytest.raises(ConfigError, match="'[abd]'"):
            scoring.push(Batch(bad, torch.arange(20)))
    assert scoring.n == 20
    np.testing.assert_allclose(scoring.scores()["cka"], exact(dict(batch(20).rows)), atol=1e-4)


def test_scores_need_rows_and_an_empty_batch_brings_none() -> None:
    scoring = scorer()
    scoring.push(Batch({"a": torch.zeros(0, 3)}, torch.arange(0)))
    with pytest.raises(StateError, match="no row has been scored yet"):
        scoring.scores()
    scoring.push(batch(3))
    with pytest.raises(ConfigError, match="got 3 rows.*at least 4"):
        scoring.scores()


def test_rows_may_come_out_of_inference_mode_and_autocast() -> None:
    scoring = scorer(portion=16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        scoring.push(batch(40))
        inside = scoring.scores()["cka"]
    np.testing.assert_array_equal(inside, scoring.scores()["cka"])
    assert not any(value.is_inference() for value in scoring.states()["cka"].values())


NAMES = [("one", "x"), ("one", "y"), ("two", "x")]
VALUES = torch.arange(9.0).reshape(3, 3)


def blocks(values: torch.Tensor, estimator: Any) -> dict[tuple[str, str], Any]:
    found = score_blocks({"label": Scored(values, 12)}, {"label": estimator}, NAMES)
    assert all(block.n == 12 and block.estimator == "label" for block in found)
    return {block.key[1:]: block for block in found}


def test_symmetric_scores_are_cut_into_one_block_per_pair() -> None:
    found = blocks(VALUES, CkaEstimator())
    assert set(found) == {("one", "one"), ("one", "two"), ("two", "two")}
    assert found["one", "one"].values.tolist() == [[0, 1], [3, 4]]
    assert found["one", "two"].values.tolist() == [[2], [5]]
    assert found["one", "two"].layers_a == ("x", "y") and found["one", "two"].layers_b == ("x",)


def test_asymmetric_scores_keep_both_directions() -> None:
    found = blocks(VALUES, VarianceRatio())
    assert found["two", "one"].values.tolist() == [[6, 7]] and not found["two", "one"].symmetric
    assert found["one", "two"].values.tolist() == [[2], [5]]


def test_layer_scores_are_cut_by_checkpoint() -> None:
    found = blocks(torch.tensor([1.0, 2.0, 3.0]), TotalVariance())
    assert found["one", "one"].values.tolist() == [1, 2] and found["one", "one"].layers_b is None
    assert found["two", "two"].values.tolist() == [3] and len(found) == 2


def named(call: Any) -> Any:
    return call


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("all", "all"),
        (-1, "-1"),
        (slice(None, 3), ":3"),
        (slice(1, None, 2), "1::2"),
        ([0, slice(2, 4)], "0, 2:4"),
        (torch.ones(2, 5, dtype=torch.bool), "mask (2, 5)"),
        (named, "named"),
    ],
)
def test_a_table_says_which_tokens_in_words(tokens: Any, text: str) -> None:
    assert tokens_text(tokens) == text


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    update, calls = Gram.update, []
    monkeypatch.setattr(Gram, "update", lambda self, *args: (calls.append(1), update(self, *args))[1])
    return lambda: len(calls)


def test_equal_statistics_are_computed_once(counting: Callable[[], int]) -> None:
    scoring = scorer("cka", CkaEstimator(unbiased=True, minibatch=True, eps=1e-6), portion=16)
    scoring.push(batch(40))
    assert counting() == 2
    assert set(scoring.scores()) == {"cka", "cka-2"} and counting() == 3
