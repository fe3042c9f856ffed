"""The entropy functions as TensorDict modules."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from information_tools import ASSIGNMENT, ENTROPY, LOG_CONSTANTS, MAHALANOBIS, MUTUAL_INFORMATION, STD_LOG, batch
from tdprobe.errors import TdprobeError
from tdprobe.latent import GaussianMixtureEntropy, MutualInformationSubBatch, SquareMahalanobisDistance
from tdprobe.latent.information.entropy import (
    gaussian_mixture_entropy,
    mutual_information_sub_batch,
    square_mahalanobis_distance,
)

NAMES = ("means", "stds", "mask", "clean", "noisy")


def data(**options) -> TensorDict:
    return TensorDict(dict(zip(NAMES, batch(**options), strict=True)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "mixture", "combine_masks": False},
        {"conditional": "sampled", "symmetric": True, "method": "matmul"},
    ],
)
def test_information_is_that_of_the_function(options):
    td, parts = data(), {}
    module = MutualInformationSubBatch(**options)
    assert module(td) is td
    plain = {name: value for name, value in options.items() if name != "combine_masks"}
    mutual_information_sub_batch(*batch(), options.get("combine_masks", True), parts, **plain)
    assert set(module.out_keys) == parts.keys() and module.out_keys[0] == MUTUAL_INFORMATION
    assert all(torch.equal(td[name], value) for name, value in parts.items())


def test_entropy_and_distance_are_those_of_the_functions():
    means, stds, mask, clean, noisy = batch()
    td = TensorDict({"x": clean, "y": noisy, "m": means, "s": stds, "k": mask})
    GaussianMixtureEntropy(["x", "y", "m", "s", "k"], "loss", estimator="mixture")(td)
    parts = {}
    value = gaussian_mixture_entropy(clean, noisy, means, stds, mask, parts, estimator="mixture")
    assert td["loss"].keys() == {ENTROPY, MAHALANOBIS, LOG_CONSTANTS, ASSIGNMENT}
    assert torch.equal(td["loss", ENTROPY], value) and torch.equal(td["loss", ASSIGNMENT], parts[ASSIGNMENT])
    for reduction in ("mean", "none"):
        module = SquareMahalanobisDistance(["x", "y", "s", "k"], ("a", "b"), reduction=reduction)
        expected = square_mahalanobis_distance(clean, noisy, stds, mask, reduction=reduction)
        assert torch.equal(module(td)[module.out_keys[0]], expected)
    assert module.out_keys == [("a", "b", "square_mahalanobis_distance")]


def test_batch_dimensions_are_data_sets_of_their_own():
    sets = [data(seed=seed) for seed in range(6)]
    td = torch.stack(sets).reshape(2, 3)
    found = MutualInformationSubBatch()(td)[MUTUAL_INFORMATION]
    alone = torch.stack([MutualInformationSubBatch()(one)[MUTUAL_INFORMATION] for one in sets])
    assert torch.equal(found, alone.reshape(2, 3))
    assert MutualInformationSubBatch()(td[:0])[STD_LOG].shape == (0, 3)


def test_it_trains_a_noise_layer_down_to_the_information_that_is_asked_for():
    """Minimise distortion plus information: with v the variance, snr = 1 / v, so v = 1 minimises v + 1 / v."""
    torch.manual_seed(0)
    log_std = nn.Parameter(torch.tensor(1.0))
    clean = torch.randn(64, 50, 2)
    clean = (clean - clean.mean((0, 1))) / clean.std((0, 1))

    def noise(clean):
        std = log_std.exp().expand_as(clean)
        return torch.zeros_like(clean), std, clean + std * torch.randn_like(clean)

    layer = TensorDictModule(noise, in_keys=["clean"], out_keys=["means", "stds", "noisy"])
    model = TensorDictSequential(layer, MutualInformationSubBatch(conditional="sampled", symmetric=True))
    optimizer = torch.optim.Adam([log_std], lr=0.1)
    for _ in range(60):
        td = model(TensorDict({"clean": clean, "mask": torch.ones(64, 50)}))
        loss = td[MUTUAL_INFORMATION] + (2 * log_std).exp() * 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert log_std.exp().item() == pytest.approx(1, abs=0.1)
    assert td[MUTUAL_INFORMATION].item() == pytest.approx(2, abs=0.3)


def test_the_way_of_modules():
    module = MutualInformationSubBatch(["m", "s", "k", "x", ("y", "z")], estimator="mixture")
    assert module.in_keys == ["m", "s", "k", "x", ("y", "z")] and not list(module.parameters())
    assert repr(module).startswith("MutualInformationSubBatch(in_keys=['m', 's', 'k', 'x', ('y', 'z')], prefix=None, ")
    assert copy.deepcopy(module).out_keys == module.out_keys


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MutualInformationSubBatch(["a", "b"]), "got 2 in_keys.*reads 5.*means, stds, mask, clean, noisy"),
        (lambda: GaussianMixtureEntropy(["a", "b", "c", "d", 5]), "got key 5"),
        (lambda: GaussianMixtureEntropy(prefix=[1]), r"got key \[1\]"),
        (lambda: MutualInformationSubBatch(estimator="x"), "unknown estimator 'x'"),
        (lambda: MutualInformationSubBatch(conditional="x"), "unknown conditional 'x'"),
        (lambda: SquareMahalanobisDistance(reduction="x"), "unknown reduction 'x'"),
        (lambda: GaussianMixtureEntropy(method="x"), "unknown method 'x'"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert isinstance(caught.value, TdprobeError)


def test_bad_input_is_refused():
    td = data()
    with pytest.raises(KeyError, match="has no 'nosy'; did you mean 'noisy'"):
        MutualInformationSubBatch(["means", "stds", "mask", "clean", "nosy"])(td)
    with pytest.raises(TypeError, match="got dict; it takes a TensorDict"):
        MutualInformationSubBatch().forward(dict(td.items()))
    td.batch_size = [6]
    with pytest.raises(ValueError, match=r"'means' has shape \(6, 4, 3\).*batch_size \(6,\).*batch_size=\[\]"):
        MutualInformationSubBatch()(td)
    with pytest.raises(ValueError, match="the batch has 5 rows"):
        MutualInformationSubBatch()(td[:5].clone().auto_batch_size_(0))
