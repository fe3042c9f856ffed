"""Programs written for the documented API run with another import root, and print what they are said to print."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from tdprobe.latent.representation_similarity import CkaEstimator, InformationImbalanceEstimator


def test_the_representation_similarity_notebook():
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    q, _ = torch.linalg.qr(torch.randn(32, 32))
    examples = {"same": (x, x.clone()), "rotated": (x, x @ q), "random": (x, torch.randn(256, 24))}
    estimator = CkaEstimator(kernel="linear")

    def run_cka(x, y):
        td = TensorDict({"data_a": x, "data_b": y}, batch_size=[])
        return estimator(td.clone())["cka"].item()

    scores = {name: run_cka(a, b) for name, (a, b) in examples.items()}
    assert scores == pytest.approx({"same": 1.0, "rotated": 1.0, "random": 0.10095701366662979}, rel=1e-6)

    batched_x = torch.randn(3, 128, 16)
    batched_y = batched_x + 0.05 * torch.randn(3, 128, 16)
    td = TensorDict({"data_a": batched_x, "data_b": batched_y}, batch_size=[3])
    cka = CkaEstimator()(td.clone())["cka"]
    assert [round(value, 4) for value in cka.tolist()] == [0.9979, 0.9978, 0.9976]

    t = torch.linspace(-1.0, 1.0, 128)
    data_a = t.unsqueeze(-1)
    data_b = (4 * t).round().unsqueeze(-1) / 4.0
    td = TensorDict({"data_a": data_a, "data_b": data_b}, batch_size=[])
    out = InformationImbalanceEstimator()(td.clone())
    assert set(out.keys()) == {
        "data_a",
        "data_b",
        "information_imbalance_a_to_b",
        "information_imbalance_b_to_a",
    }
    assert all(value.dtype == torch.float32 for value in out.values()) and out.batch_size == torch.Size([])
    # The steps of b forget where on a step a was, while a tells everything about b.
    assert out["information_imbalance_a_to_b"] < out["information_imbalance_b_to_a"] < 0.2
    assert out["information_imbalance_a_to_b"].shape == ()
