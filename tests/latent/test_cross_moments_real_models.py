"""Measures of cross moments on SmolLM2: the stream against rows at hand, and what a sketch changes."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from tdprobe import hf, registry
from tdprobe.latent import LayerScoring
from tdprobe.latent.representation_similarity.cka import cka_matrix

LAYERS = (8, 16, 26)
NAMES = ("cca", "gulp", "linear_regression", "procrustes", "pwcca", "svcca")


@pytest.fixture(scope="module")
def streamed(smollm2):
    """Return scores by name of a stream, the same of a sketched one, and the rows."""
    model, tokenizer = smollm2
    inputs = [batch.inputs for batch in hf.batches(hf.read_texts("demo")[:64], tokenizer, batch_size=16)]
    pattern = rf"model\.layers\.({'|'.join(map(str, LAYERS))})$"
    sketched = [registry.get(name)(sketch=256, mode="robust") for name in NAMES]
    factory = LayerScoring(pattern, [*NAMES, *sketched], rows_per_update=100, max_norm=None)
    parts = []
    with torch.no_grad(), factory.prepare(model) as hooked:
        for batch in inputs:
            states = hooked(**batch, output_hidden_states=True).hidden_states
            mask = (batch["attention_mask"].cumsum(1) > 1) & batch["attention_mask"].bool()
            parts.append([states[layer + 1][mask] for layer in LAYERS])
    table = hooked.hooking_context.scores()
    return table, [torch.cat(x) for x in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_gives_the_value_of_all_rows(streamed, name):
    table, rows = streamed
    # More rows than columns, and float32 products in portions of 100.
    assert len(rows[0]) > 700
    found = table.matrix(name)
    for i in range(3):
        for j in range(3):
            td = TensorDict({"data_a": rows[i].double(), "data_b": rows[j].double()})
            estimator = registry.get(name)(mode="robust")
            assert found[i, j] == pytest.approx(estimator(td)[estimator.out_key].item(), rel=2e-4, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_sketch_errs_to_the_documented_side(streamed, name):
    table, _ = streamed
    exact, sketched = table.matrix(name), table.matrix(f"{name}-2")
    error = (sketched - exact)[[0, 1, 0], [1, 2, 2]] / exact.max()
    # Fewer columns correlate less and explain less, and so are farther apart.
    assert ((error if name in ("procrustes", "gulp") else -error) > 0).all()
    assert abs(error).max() < 0.5


def test_shuffled_layers_look_alike_to_biased_cka_only(streamed):
    """Over all permutations ``tr(K L)`` is ``tr K tr L / (n - 1)`` on average, and HSIC_1 is 0."""
    _, rows = streamed
    n, generator = 64, torch.Generator().manual_seed(0)
    a, b = (x[:n].double() for x in rows[:2])
    orders = [torch.randperm(n, generator=generator) for _ in range(60)]
    found = {
        unbiased: torch.stack([cka_matrix([a, b[order]], unbiased=unbiased)[0, 1] for order in orders])
        for unbiased in (False, True)
    }
    grams = [(x - x.mean(0)) @ (x - x.mean(0)).T for x in (a, b)]
    expected = torch.stack([gram.trace() / gram.norm() for gram in grams]).prod() / (n - 1)
    error = {unbiased: values.std() / len(orders) ** 0.5 for unbiased, values in found.items()}
    assert expected > 0.1
    assert abs(found[False].mean() - expected) < 4 * error[False]
    assert abs(found[True].mean()) < 4 * error[True] < 0.05
