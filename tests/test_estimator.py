"""The estimator contract, on the smallest layer estimator there is, and on batches."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

from tdprobe.errors import ConfigError
from tdprobe.estimator import LayerEstimator
from tdprobe.latent.representation_similarity import CkaEstimator
from tdprobe.stats import Moments
from tdprobe.stats.state import State
from tdprobe.stream.batch import Batch


class TotalVariance(LayerEstimator):
    """Sum the variances of all columns."""

    def __init__(self, in_key="data", out_key="variance", ddof=1):
        super().__init__([in_key], [out_key])
        self.in_key, self.out_key, self.ddof = in_key, out_key, ddof

    def statistic(self):
        return Moments()

    def score(self, state):
        traces = [state.scatters[str(i)].diagonal(dim1=-2, dim2=-1).sum(-1) for i in range(len(state.mu.keys()))]
        return TensorDict({"score": torch.stack(traces, -1) / (state.n - self.ddof)})


def test_one_shot_writes_the_score_into_the_same_tensordict():
    x = torch.randn(4, 20, 3)
    td = TensorDict({"data": x}, batch_size=[4])
    assert TotalVariance()(td) is td
    torch.testing.assert_close(td["variance"], x.var(1).sum(-1))


def test_streaming_scores_every_layer_as_the_one_shot_call_does():
    rows = {name: torch.randn(50, d) + 3 for name, d in (("wide", 9), ("thin", 1))}
    estimator = TotalVariance()
    batches = [
        Batch({name: x[part] for name, x in rows.items()}, torch.arange(50)[part])
        for part in (slice(0, 10), slice(10, 13), slice(13, 50))
    ]
    state = estimator.init(batches[0])
    for batch in batches:
        state = estimator.update(state, batch)
    expected = torch.stack([estimator(TensorDict({"data": x}))["variance"] for x in rows.values()])
    torch.testing.assert_close(estimator.score(state)["score"].float(), expected)


def test_it_is_a_tensordict_module_among_others():
    chain = TensorDictSequential(TotalVariance(("a", "x"), "va"), TotalVariance("y", ("out", "vy")))
    td = chain(TensorDict({"a": {"x": torch.arange(4.0).unsqueeze(1)}, "y": torch.arange(3).unsqueeze(1)}))
    assert td["va"].item() == pytest.approx(5 / 3) and td["out", "vy"].item() == 1.0
    selected = TotalVariance().select_out_keys()
    assert list(selected(TensorDict({"data": torch.zeros(3, 1)})).keys()) == ["data"]


def test_repr_shows_the_constructor_arguments():
    assert repr(TotalVariance(ddof=0)) == "TotalVariance(in_key='data', out_key='variance', ddof=0)"
    shown = repr(CkaEstimator("a", ("b", "c"), unbiased=True))
    assert shown.startswith("CkaEstimator(in_key_a='a', in_key_b=('b', 'c'), out_key='cka', kernel='linear'")
    assert "unbiased=True" in shown


def test_plain_tensors_are_a_type_error():
    with pytest.raises(TypeError, match="got Tensor; it takes a TensorDict that holds"):
        TotalVariance()(torch.zeros(3, 2))
    with pytest.raises(TypeError):
        TotalVariance()(data=torch.zeros(3, 2))


def test_a_missing_key_is_answered_with_the_close_ones():
    with pytest.raises(KeyError, match="lacks 'data'; did you mean 'data_a'") as caught:
        TotalVariance()(TensorDict({"data_a": torch.zeros(3, 2), "other": torch.zeros(3)}))
    assert "'other'" in str(caught.value)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_tensors_without_rows_and_columns_are_refused(shape):
    with pytest.raises(ValueError, match="'data' has shape"):
        TotalVariance()(TensorDict({"data": torch.zeros(shape)}))


def test_samples_in_the_batch_size_are_refused_before_anything_is_written():
    td = TensorDict({"data": torch.zeros(4, 20, 3)}, batch_size=[4, 20])
    with pytest.raises(ValueError, match=r"batch_size \(4, 20\).*use batch_size=\[4\]"):
        TotalVariance()(td)
    assert list(td.keys()) == ["data"]


def test_keys_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="got key 3"):
        TotalVariance(in_key=3)


def test_an_estimator_without_scores_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (LayerEstimator,), {"statistic": lambda self: Moments()})(["a"], ["b"])


def test_a_state_without_merge_says_so():
    class Bare(State):
        n: torch.Tensor

    with pytest.raises(NotImplementedError, match="Bare"):
        Bare(n=torch.tensor(0)).merge(Bare(n=torch.tensor(0)))


class TestBatch:
    def test_layers_with_other_sample_counts_are_named(self):
        rows = {"h.0": torch.zeros(5, 2), "h.1": torch.zeros(5, 3), "head": torch.zeros(4, 2)}
        with pytest.raises(ConfigError, match=r"'head' has 4 rows, but 'h\.0', 'h\.1' 5"):
            Batch(rows, torch.arange(5))

    def test_ids_must_fit(self):
        with pytest.raises(ConfigError, match=r"ids have shape \(4,\).*\(5,\)"):
            Batch({"h": torch.zeros(5, 2)}, torch.arange(4))
        with pytest.raises(ConfigError, match="int64"):
            Batch({"h": torch.zeros(5, 2)}, torch.arange(5).int())

    def test_rows_must_be_there(self):
        with pytest.raises(ConfigError, match="without layers"):
            Batch({}, torch.arange(0))
        with pytest.raises(ConfigError, match="'h' has shape"):
            Batch({"h": torch.zeros(5)}, torch.arange(5))

    def test_n_counts_samples_not_data_sets(self):
        assert Batch({"h": torch.zeros(2, 5, 3)}, torch.arange(5)).n == 5
