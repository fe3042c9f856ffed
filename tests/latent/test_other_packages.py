"""What other packages say of the same rows: dadapy 0.3.4 and scikit-dimension 0.5.0, which need an older NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neighbor_tools import scored
from tdprobe.latent import (
    CorrelationDimensionEstimator,
    GrideDimensionEstimator,
    InformationImbalanceEstimator,
    LocalPcaDimensionEstimator,
    MleDimensionEstimator,
    MutualKnnEstimator,
    TwoNnDimensionEstimator,
)

# dadapy: _compute_id_gride_single_scale with eps=1e-10, the dimension and its error by the nearer rank.
GRIDE = {
    1: (4.394960728012196, 0.25374317593956747),
    2: (5.061121176303361, 0.21059326491241145),
    4: (4.941194802974644, 0.14574583853793605),
    8: (4.884037501037387, 0.10181866925215723),
    16: (4.640036293248688, 0.06837256062406381),
    32: (4.067517769018181, 0.04237615063046732),
}
# dadapy: _return_imbalance, both ways by the number of neighbours.
IMBALANCE = {
    1: (0.49875555555555556, 0.44555555555555554),
    3: (0.5383925925925926, 0.4724888888888889),
    10: (0.5779466666666666, 0.5314733333333334),
}
# scikit-dimension: TwoNN, MLE(n_neighbors=20), CorrInt and the mean of lPCA.fit_pw(n_neighbors=50).
SINGLE = [
    (TwoNnDimensionEstimator(mode="robust"), 4.725845702075135),
    (MleDimensionEstimator(combine="pooled"), 4.885643584300269),
    (MleDimensionEstimator(combine="average"), 5.152939845116789),
    (MleDimensionEstimator(combine="median"), 4.944353637244861),
    (CorrelationDimensionEstimator(), 4.1490349041826375),
    (LocalPcaDimensionEstimator(rule="fo"), 5.0),
    (LocalPcaDimensionEstimator(rule="maxgap"), 2.9966666666666666),
    (LocalPcaDimensionEstimator(rule="ratio"), 5.0),
    (LocalPcaDimensionEstimator(rule="fan"), 2.8966666666666665),
    # dadapy: compute_id_2NN(algorithm="ml", mu_fraction=1) and compute_id_2NN_wprior(alpha=2, beta=5).
    (TwoNnDimensionEstimator(method="ml"), 4.3949607280154295),
    (TwoNnDimensionEstimator(method="bayes"), 4.135147447115487),
]


@pytest.fixture(scope="module")
def layers():
    # NumPy promises that these numbers never change.
    draw = np.random.RandomState(0).standard_normal
    x = draw((300, 5))
    y = np.hstack([x[:, :3] + 0.3 * draw((300, 3)), draw((300, 4))])
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize(("estimator", "expected"), SINGLE, ids=lambda value: str(value)[:40])
def test_dimension(layers, estimator, expected):
    assert float(scored(estimator, layers[0])["score"]) == pytest.approx(expected, rel=1e-8)


def test_every_scale_with_its_error(layers):
    found = scored(GrideDimensionEstimator(), layers[0])
    expected = [torch.tensor(column, dtype=torch.float64) for column in zip(*GRIDE.values(), strict=True)]
    assert found["ranks"].tolist() == list(GRIDE)
    torch.testing.assert_close(found["scales"][0], expected[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(found["scales_se"][0], expected[1], rtol=1e-8, atol=0)


@pytest.mark.parametrize("k", IMBALANCE)
def test_imbalance_by_several_neighbours(layers, k):
    found = scored(InformationImbalanceEstimator(k=k), *layers)["score"]
    assert [float(found[0, 1]), float(found[1, 0])] == pytest.approx(IMBALANCE[k], rel=1e-12)


def test_common_neighbours(layers):
    # dadapy: return_data_overlap(k=10).
    assert float(scored(MutualKnnEstimator(), *layers)["score"][0, 1]) == pytest.approx(0.14133333333333334, rel=1e-12)


def test_of_a_posterior_the_spread_is_known(layers):
    # The error is widened by 1.5 for points that are each other's neighbours.
    found = scored(TwoNnDimensionEstimator(method="bayes"), layers[0])["se"]
    assert float(found) == pytest.approx(1.5 * 0.2379509967456968, rel=1e-8)
