"""Programs written for the documented API run with another import root, and print what they are said to print."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge
from tensordict import TensorDict
from torch import nn

from tdprobe.latent import (
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    BilinearProbeManager,
    LocalKnnDimensionEstimator,
    ProbeManager,
    Probing,
    SteeringVectors,
    TwoNnDimensionEstimator,
)
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


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1, self.linear2, self.linear3 = nn.Linear(10, 20), nn.Linear(20, 20), nn.Linear(20, 5)

    def forward(self, x, scale=1.0):
        return self.linear3(torch.relu(self.linear2(torch.relu(self.linear1(x))))) * scale

    def by_hand(self, x, change=None):
        """Return the output of every layer; ``change`` maps the name of a layer and its output to a new one."""
        found, h = {}, x
        for name in ("linear1", "linear2", "linear3"):
            h = getattr(self, name)(h)
            h = change(name, h) if change else h
            found[name], h = h, torch.relu(h)
        return found


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


@pytest.fixture
def inputs():
    return torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(1))


def test_caching_in_every_direction(net, inputs):
    def first(**kwargs):
        value = kwargs.get("output", kwargs.get("grad_output", kwargs.get("args")))
        return value[0] if isinstance(value, tuple) else value

    cache = TensorDict()
    factory = ActivationCaching("linear", cache=cache, callback=first, directions=["fwd", "fwd_pre", "bwd"])
    x = inputs[0].clone().requires_grad_()
    with factory.prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
        td = TensorDict({"x": x}, batch_size=7)
        assert hooked(td) is td
        td["y"].pow(2).sum().backward()
    values = net.by_hand(x)
    assert set(cache.keys()) == {"fwd", "fwd_pre", "bwd"}
    for name, value in values.items():
        assert torch.equal(cache["fwd", name], value)
    assert torch.equal(cache["fwd_pre", "linear2"], torch.relu(values["linear1"]))
    grads = torch.autograd.grad(values["linear3"].pow(2).sum(), list(values.values()))
    for name, grad in zip(values, grads, strict=True):
        torch.testing.assert_close(cache["bwd", name], grad)


def test_a_call_keeps_its_form(net, inputs):
    x = inputs[0]
    context = ActivationCaching("linear1$").prepare(
        net, in_keys={"x": ("in", "x"), "scale": "s"}, out_keys=[("o", "y")]
    )
    with context as hooked:
        td = hooked(TensorDict({"in": {"x": x}, "s": torch.tensor(2.0)}))
        with hooked.disable_context_hooks():
            context.clear()
            net(x)
        assert context.cache.is_empty()
    torch.testing.assert_close(td["o", "y"], 2 * net.by_hand(x)["linear3"])
    hooked = ActivationCaching("linear1$").prepare(net, return_context=False)
    assert torch.equal(hooked(x), net(x))
    hooked.restore()
    assert torch.equal(hooked.hooking_context.cache["linear1"], net.by_hand(x)["linear1"])


@pytest.mark.parametrize("mix", [None, lambda module_key, output, output_to_patch: output + 0.5 * output_to_patch])
def test_patching(net, inputs, mix):
    clean, other = inputs
    with ActivationPatching(["linear2"], patch_fn=mix).prepare(net) as hooked:
        result = hooked(TensorDict({"input": clean, "patched": {"input": other}}, batch_size=7))
    stored = net.by_hand(clean)

    def change(name, output):
        if name != "linear2":
            return output
        return stored[name] if mix is None else output + 0.5 * stored[name]

    assert torch.equal(result["output"], stored["linear3"])
    assert torch.equal(result["patched", "output"], net.by_hand(other, change)["linear3"])
    assert set(result.keys(True, True)) == {"input", "output", ("patched", "input"), ("patched", "output")}


def test_a_contrast_becomes_a_steering_vector(net, inputs):
    positive, negative = inputs
    with ActivationAddition(["linear1", "linear2"]).prepare(net) as hooked:
        found = hooked(TensorDict({"positive": {"input": positive}, "negative": {"input": negative}}, batch_size=7))
    assert set(found.keys(True, True)) == {("steer", "linear1"), ("steer", "linear2")}
    a, b = net.by_hand(positive), net.by_hand(negative)
    for name in ("linear1", "linear2"):
        torch.testing.assert_close(found["steer", name], (a[name] - b[name]).mean(0))
    vector = found["steer", "linear2"]

    def steer(module_key, output):
        return output + 3 * vector

    with SteeringVectors(["linear2"], steer).prepare(net) as hooked:
        steered = hooked(negative)
    expected = net.by_hand(negative, lambda name, output: output + 3 * vector if name == "linear2" else output)
    torch.testing.assert_close(steered, expected["linear3"])


def test_probes_fit_and_predict_by_what_the_tensordict_says(net, inputs):
    def mean_square(predictions, labels):
        return {"mse": ((torch.as_tensor(predictions) - labels) ** 2).mean().item()}

    manager = ProbeManager(Ridge, {"alpha": 0.1}, mean_square)
    labels = torch.randn(7, generator=torch.Generator().manual_seed(2))
    probing = Probing("linear", manager.probe_factory, additional_keys=["labels", "step_type"])
    with torch.no_grad(), probing.prepare(net) as hooked:
        for x, step_type in zip(inputs, ("fit", "predict"), strict=True):
            hooked(TensorDict({"input": x, "labels": labels, "step_type": step_type}, batch_size=[]))
    fitted, tested = net.by_hand(inputs[0]), net.by_hand(inputs[1])
    assert set(manager.estimators) == {f"{name}_fwd" for name in fitted}
    for name in fitted:
        ridge = Ridge(alpha=0.1).fit(fitted[name].numpy(), labels.numpy())
        for metrics, rows in ((manager.fit_metrics, fitted), (manager.predict_metrics, tested)):
            expected = mean_square(ridge.predict(rows[name].numpy()), labels)
            assert metrics[f"{name}_fwd"] == pytest.approx(expected, rel=1e-4)


def test_bilinear_probes_get_both_layers(net, inputs):
    class Overlap:
        def fit(self, h1, h2, y):
            self.shift = (y - self.raw(h1, h2)).mean()

        def raw(self, h1, h2):
            return (h1[:, :5] * h2[:, :5]).sum(1)

        def predict(self, h1, h2):
            return self.raw(h1, h2) + self.shift

    pairs = [("linear1", "linear2"), ("linear1", "linear3")]
    manager = BilinearProbeManager(pairs, Overlap, {}, lambda p, y: {"error": (p - y).abs().mean().item()})
    labels = torch.randn(7, generator=torch.Generator().manual_seed(2))
    probing = Probing(manager.key_pattern, manager.probe_factory, additional_keys=["labels", "step_type"])
    with torch.no_grad(), probing.prepare(net) as hooked:
        manager.before_all()
        for x, step_type in zip(inputs, ("fit", "predict"), strict=True):
            hooked(TensorDict({"input": x, "labels": labels, "step_type": step_type}, batch_size=[]))
        manager.after_all()
    fitted, tested = net.by_hand(inputs[0]), net.by_hand(inputs[1])
    for a, b in pairs:
        by_hand = Overlap()
        by_hand.fit(fitted[a], fitted[b], labels)
        expected = (by_hand.predict(tested[a], tested[b]) - labels).abs().mean().item()
        assert manager.predict_metrics[f"{a}_{b}_fwd"]["error"] == pytest.approx(expected, rel=1e-5)


def test_single_modules_are_read_and_written(net, inputs):
    x, cache = inputs[0], TensorDict()
    with ActivationCaching("linear3").prepare(net) as hooked:
        _, proxy = hooked.get(cache, "linear1")
        hooked.set("linear2", torch.full((7, 20), 0.3))
        output = hooked(x)
    assert torch.equal(proxy.resolve(), net.by_hand(x)["linear1"])
    assert torch.equal(output, net.linear3(torch.full((7, 20), 0.3)))


def test_dimensions_of_several_data_sets_at_once():
    flat = torch.rand(2, 800, 2, generator=torch.Generator().manual_seed(0))
    data = torch.cat([flat, flat.sum(-1, keepdim=True)], -1)
    td = TwoNnDimensionEstimator(in_key="x", out_key="d")(TensorDict({"x": data}, batch_size=[2]))
    # Three standard deviations: the slope over 800 points scatters by about 0.1.
    assert td["d"].shape == (2,) and td["d"].tolist() == pytest.approx([2, 2], abs=0.3)
    td = LocalKnnDimensionEstimator(k=20)(TensorDict({"data": data}, batch_size=[2]))
    assert td["dimension"].shape == (2, 800)
    assert td["dimension"].median(-1).values.tolist() == pytest.approx([2, 2], abs=0.25)
