"""CKA: documented figures, closed forms, an independent reference, invariances that hold and that do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import linear_kernel
from sklearn.preprocessing import KernelCenterer
from tensordict import TensorDict

from tdprobe.latent.representation_similarity import CkaEstimator, cka_matrix
from tdprobe.stream.batch import Batch

VARIANTS = [{}, {"unbiased": True}, {"minibatch": True}, {"unbiased": True, "minibatch": True}]


def cka(a, b, **options):
    return CkaEstimator(**options)(TensorDict({"data_a": a, "data_b": b}))["cka"]


def pair(n=80, d_a=6, d_b=9, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    rows = []
    for d in (d_a, d_b):
        noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
        rows.append((common @ torch.randn(2, d, generator=generator, dtype=torch.float64) + noise).to(dtype))
    return rows


def reference(a, b, unbiased):
    p, q = (linear_kernel(x.double().numpy() - x.double().numpy().mean(0)) for x in (a, b))
    if not unbiased:
        p, q = (KernelCenterer().fit_transform(gram) for gram in (p, q))
        return (p * q).sum() / np.sqrt((p * p).sum() * (q * q).sum())
    np.fill_diagonal(p, 0)
    np.fill_diagonal(q, 0)
    n = len(p)

    def hsic(u, v):
        return (u * v).sum() + u.sum() * v.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (u @ v).sum()

    return hsic(p, q) / np.sqrt(hsic(p, p) * hsic(q, q))


def stream(estimator, rows, sizes):
    parts = zip(*(x.split(sizes) for x in rows), strict=True)
    batches = [Batch(dict(zip("ab", part, strict=True)), torch.arange(len(part[0]))) for part in parts]
    state = estimator.init(batches[0])
    for batch in batches:
        state = estimator.update(state, batch)
    return estimator.score(state)["score"]


def test_the_documented_synthetic_example():
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    q, _ = torch.linalg.qr(torch.randn(32, 32))
    examples = {"same": (x, x.clone()), "rotated": (x, x @ q), "random": (x, torch.randn(256, 24))}
    scores = {name: cka(a, b).item() for name, (a, b) in examples.items()}
    assert scores == pytest.approx({"same": 1.0, "rotated": 1.0, "random": 0.10095701366662979}, rel=1e-6)


def test_the_documented_batched_example():
    torch.manual_seed(0)
    # What the documented example draws first.
    _ = torch.randn(256, 32), torch.randn(32, 32), torch.randn(256, 24)
    x = torch.randn(3, 128, 16)
    y = x + 0.05 * torch.randn(3, 128, 16)
    td = TensorDict({"data_a": x, "data_b": y}, batch_size=[3])
    assert CkaEstimator()(td)["cka"].tolist() == pytest.approx([0.9979, 0.9978, 0.9976], abs=5e-5)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("shape", [(4, 1, 1), (5, 30, 2), (80, 6, 9), (200, 300, 7)])
def test_values_equal_the_definition(shape, options):
    a, b = pair(*shape)
    estimator = CkaEstimator(**options)
    batch = Batch({"a": a, "b": b}, torch.arange(len(a)))
    score = estimator.score(estimator.update(estimator.init(batch), batch))["score"]
    expected = reference(a, b, options.get("unbiased", False))
    assert score.dtype == torch.float64 and score[0, 1].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert cka(a, b, **options).item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_closed_form():
    # CKA of single columns is their squared correlation, here (1/2)^2.
    a = torch.tensor([[1.0], [0.0], [-1.0]])
    b = torch.tensor([[1.0], [-1.0], [0.0]])
    assert cka(a, b).item() == pytest.approx(0.25)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("offset", [100.0, 1000.0])
def test_float32_holds_at_an_offset(offset, options):
    a, b = (x + offset for x in pair(500, 40, 60, dtype=torch.float32))
    unbiased = options.get("unbiased", False)
    assert cka(a, b, **options).item() == pytest.approx(reference(a, b, unbiased), rel=1e-4)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_never_matters(scale, dtype, options):
    a, b = pair(dtype=dtype)
    assert cka(a * scale, a * scale, **options).item() == pytest.approx(1.0)
    assert cka(a * scale, b, **options).item() == pytest.approx(cka(a, b, **options).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_other_dtypes_accumulate_in_float32(dtype):
    a, b = (x > 0 if dtype is torch.bool else (100 * x).to(dtype) for x in pair())
    score = cka(a, b)
    assert score.dtype == torch.float32
    assert score.item() == pytest.approx(reference(a, b, False), rel=1e-5)
    assert cka(a, b.double()).item() == pytest.approx(reference(a, b, False), rel=1e-6)


class TestInvariances:
    """The row of the spec as properties: what it lists keeps the value, what it leaves out does not."""

    def transforms(self, d):
        generator = torch.Generator().manual_seed(1)
        normal = torch.randn(d, d, generator=generator, dtype=torch.float64)
        return {
            "permutation": lambda x: x[:, torch.randperm(d, generator=generator)],
            "orthogonal": lambda x: x @ torch.linalg.qr(normal).Q,
            "isotropic scaling": lambda x: -7.5 * x,
            "translation": lambda x: x + 20 * normal[0],
            "invertible linear": lambda x: x @ normal,
        }

    @pytest.mark.parametrize("options", VARIANTS)
    def test_declared_ones_hold_and_others_fail(self, options):
        a, b = pair()
        plain = cka(a, b, **options).item()
        for name, transform in self.transforms(a.shape[1]).items():
            moved = cka(transform(a), b, **options).item()
            kept = moved == pytest.approx(plain, rel=1e-5)
            assert kept == (name in CkaEstimator.spec.invariant_to), name

    @pytest.mark.parametrize("options", VARIANTS)
    def test_symmetric_within_bounds_and_blind_to_the_order_of_samples(self, options):
        a, b = pair()
        order = torch.randperm(len(a), generator=torch.Generator().manual_seed(2))
        value = cka(a, b, **options)
        torch.testing.assert_close(value, cka(b, a, **options))
        torch.testing.assert_close(value, cka(a[order], b[order], **options))
        assert cka(a, b[order], **options) < value / 2
        assert CkaEstimator.spec.bounds[0] <= value <= CkaEstimator.spec.bounds[1]


def test_bias_of_few_samples_and_its_removal():
    # Independent wide rows: the biased value tends to d / (n + d), the unbiased one scatters around 0.
    generator = torch.Generator().manual_seed(0)
    independent = torch.randn(20, 2, 64, 512, generator=generator).unbind()
    biased = torch.stack([cka(a, b) for a, b in independent])
    unbiased = torch.stack([cka(a, b, unbiased=True) for a, b in independent])
    assert biased.mean().item() == pytest.approx(512 / (64 + 512), abs=0.02)
    assert abs(unbiased.mean()) < 4 * unbiased.std() / 20**0.5 and unbiased.abs().max() < 0.1


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5).filter(lambda s: sum(s) > 3),
    st.booleans(),
    st.integers(0, 9),
)
def test_a_stream_in_any_batches_equals_the_one_shot_value(sizes, unbiased, seed):
    a, b = pair(sum(sizes), 3, 5, seed)
    score = stream(CkaEstimator(unbiased=unbiased), [a, b], sizes)[0, 1]
    assert score.item() == pytest.approx(reference(a, b, unbiased), rel=1e-9, abs=1e-10)


def test_minibatches_sum_the_products_by_rows_before_the_ratio():
    a, b = pair(60, seed=3)
    score = stream(CkaEstimator(unbiased=True, minibatch=True), [a, b], [20, 30, 10])[0, 1]
    products = np.zeros((2, 2))
    for part in torch.arange(60).split([20, 30, 10]):
        for i, x in enumerate((a, b)):
            for j, y in enumerate((a, b)):
                n = len(part)
                p, q = (linear_kernel(z[part].numpy()) for z in (x, y))
                np.fill_diagonal(p, 0)
                np.fill_diagonal(q, 0)
                value = (p * q).sum() + p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (p @ q).sum()
                products[i, j] += n * value / (n * (n - 3))
    assert score.item() == pytest.approx(products[0, 1] / np.sqrt(products[0, 0] * products[1, 1]), rel=1e-9)


@pytest.mark.parametrize("options", VARIANTS)
def test_leading_dimensions_and_nested_keys(options):
    sets = [pair(20, seed=seed) for seed in range(6)]
    a, b = (torch.stack(x).unflatten(0, (2, 3)) for x in zip(*sets, strict=True))
    td = TensorDict({"x": {"a": a}, "b": b}, batch_size=[2])
    estimator = CkaEstimator(("x", "a"), "b", ("scores", "cka"), **options)
    assert estimator(td) is td
    expected = torch.stack([cka(*rows, **options) for rows in sets]).view(2, 3)
    torch.testing.assert_close(td["scores", "cka"], expected)


@pytest.mark.parametrize("unbiased", [True, False])
def test_matrix_holds_every_pair(unbiased):
    a, b = pair(40)
    rows = [a, b, torch.cat([a, b], 1)[:, ::2]]
    matrix = cka_matrix(rows, unbiased=unbiased)
    expected = [[reference(x, y, unbiased) for y in rows] for x in rows]
    np.testing.assert_allclose(matrix, expected, rtol=1e-9)
