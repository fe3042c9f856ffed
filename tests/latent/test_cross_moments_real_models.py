"""Measures of cross moments on SmolLM2: the stream against rows at hand, and what a sketch changes."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from tdprobe import hf, registry
from tdprobe.latent import LayerScoring

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
