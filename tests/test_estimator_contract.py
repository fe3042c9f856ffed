"""What every estimator of the registry must keep, those of other packages included: the tests read its Spec."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from estimator_rows import ROWS, WIDTHS, N, Row
from tdprobe import registry
from tdprobe.errors import ConfigError
from tdprobe.stats import load_state
from tdprobe.stream.batch import Batch

FOREIGN = Path(__file__).parent / "foreign_package"
NAMES = [*registry.names(), "foreign_spread"]
INVARIANCES = ("permutation", "orthogonal", "isotropic scaling", "translation", "invertible linear")


def class_of(name):
    """Return an estimator class; the foreign one comes in by its entry point, as it would from another package."""
    if name != "foreign_spread" or name in registry._classes:
        return registry.get(name)
    sys.path.insert(0, str(FOREIGN))
    registry._load.cache_clear()
    try:
        return registry.get(name)
    finally:
        sys.path.remove(str(FOREIGN))


def row_of(name):
    return Row(lambda x: x.std(0, correction=0).norm(), least=1) if name == "foreign_spread" else ROWS[name]


@pytest.fixture(autouse=True, scope="module")
def only_here():
    """Take the foreign estimator out of the registry again."""
    yield
    registry._classes.pop("foreign_spread", None)


def rows(seed=0, n=N, kind=torch.float64):
    """Return three related layers of different widths, with columns of different scale."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 3, generator=g, dtype=torch.float64)
    layers = []
    for width in WIDTHS:
        noise = torch.randn(n, width, generator=g, dtype=torch.float64)
        scale = torch.linspace(0.6, 1.6, width, dtype=torch.float64)
        layers.append((common @ torch.randn(3, width, generator=g, dtype=torch.float64) + 0.5 * noise) * scale)
    return [x.to(kind) for x in layers]


def targets(name, seed=0, n=N):
    """Return attributes: one that the first layer knows, one that nothing knows; or those of the row."""
    if (own := row_of(name).targets) is not None:
        return own(n)
    known = rows(seed, n)[0][:, :1]
    return torch.cat([known, torch.randn(n, 1, generator=torch.Generator().manual_seed(seed + 9)).double()], 1)


def build(name, **options):
    cls = class_of(name)
    return cls(**{**row_of(name).options, **options})


def batch_of(estimator, layers, known=None, ids=None):
    n = layers[0].shape[-2]
    known = targets(estimator.spec.name, n=n) if known is None and estimator.target_keys else known
    given_targets = {key: columns(estimator, key, known) for key in estimator.target_keys}
    ids = torch.arange(n) if ids is None else ids
    return Batch({f"layer {i}": x for i, x in enumerate(layers)}, ids, given_targets)


def columns(estimator, key, known):
    """Return the columns of the targets that an estimator reads under a key."""
    return known[..., row_of(estimator.spec.name).columns.get(key, slice(None))]


def score(name, layers, known=None, **options):
    """Score layers in one update; of pairs only different layers count."""
    estimator = build(name, **options)
    batch = batch_of(estimator, layers, known)
    return estimator.score(estimator.update(estimator.init(batch), batch))["score"]


def states(estimator, batch, cuts):
    found = []
    for start, stop in zip([0, *cuts], [*cuts, batch.n], strict=True):
        part = batch.select(slice(start, stop))
        found.append(estimator.update(estimator.init(part), part))
    return found


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_every_estimator_has_a_row_and_no_row_is_left_over():
    own = {name for name in registry.names() if class_of(name).__module__.startswith("tdprobe.")}
    assert own == set(ROWS)


@pytest.mark.parametrize("name", [name for name in NAMES if not row_of(name).ordered])
class TestOrder:
    """Of rows that do not belong together; others are cut and merged in tests of their own."""

    @settings(max_examples=8, deadline=None)
    @given(cuts=st.lists(st.integers(8, N - 8), min_size=1, max_size=3, unique=True).map(sorted), order=st.randoms())
    def test_one_shot_streamed_and_merged_agree_in_any_order_and_grouping(self, name, cuts, order):
        estimator = build(name)
        batch = batch_of(estimator, rows())
        whole = estimator.score(estimator.update(estimator.init(batch), batch))["score"]
        parts = states(estimator, batch, cuts)
        streamed = estimator.init(batch)
        for start, stop in zip([0, *cuts], [*cuts, N], strict=True):
            streamed = estimator.update(streamed, batch.select(slice(start, stop)))
        close(estimator.score(streamed)["score"], whole, 1e-9)
        while len(parts) > 1:
            first, second = (parts.pop(order.randrange(len(parts))) for _ in range(2))
            parts.append(first.merge(second))
        close(estimator.score(parts[0])["score"], whole, 1e-9)

    def test_the_order_of_rows_does_not_matter(self, name):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
        close(score(name, [x[order] for x in rows()], targets(name)[order]), score(name, rows(), targets(name)), 1e-8)

    @pytest.mark.parametrize("order", [(1, 2, 0), (2, 0, 1)])
    def test_merged_in_any_order_and_grouping_is_the_streaming_form_in_the_same_portions(self, name, order):
        estimator = streaming(name)
        batch = batch_of(estimator, rows())
        streamed = estimator.init(batch)
        for start in range(0, N, 20):
            streamed = estimator.update(streamed, batch.select(slice(start, start + 20)))
        a, b, c = (states(estimator, batch, [20, 40])[place] for place in order)
        expected = estimator.score(streamed)["score"]
        assert not expected.isnan().all()
        for merged in (a.merge(b).merge(c), a.merge(b.merge(c))):
            close(estimator.score(merged)["score"], expected, 1e-9)


# The definitions of others take more than a row, and are tested beside them.
@pytest.mark.parametrize("name", [name for name in NAMES if row_of(name).reference is not None])
class TestDefinition:
    def test_float64_is_the_definition(self, name):
        reference, kind = row_of(name).reference, class_of(name).spec.kind
        layers, found = rows(), score(name, rows())
        if kind == "pair":
            expected = torch.tensor([[float(reference(a, b)) for b in layers] for a in layers], dtype=torch.float64)
            off = ~torch.eye(len(layers), dtype=torch.bool)
            found, expected = found[off], expected[off]
        elif kind == "layer":
            expected = torch.tensor([float(reference(x)) for x in layers], dtype=torch.float64)
        else:
            expected = torch.stack([torch.as_tensor(reference(x, targets(name))) for x in layers]).double()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
class TestStream:
    def test_the_call_is_the_stream(self, name):
        estimator = build(name)
        cls, layers = type(estimator), rows()
        names = {"layer": estimator.in_keys[:1], "pair": estimator.in_keys[:2]}.get(
            cls.spec.kind, estimator.in_keys[:1]
        )
        td = TensorDict(dict(zip(names, layers, strict=False)))
        for key in estimator.target_keys:
            td[key] = columns(estimator, key, targets(name))
        estimator(td)
        batch = batch_of(estimator, layers[: len(names)])
        found = estimator.score(estimator.update(estimator.init(batch), batch))["score"]
        value = {"layer": found[..., 0], "pair": found[..., 0, 1] if cls.spec.kind == "pair" else None}
        expected = value.get(cls.spec.kind, found[..., 0, :] if found.ndim > 1 else found)
        written = td[estimator.out_keys[0]]
        if written.shape == expected.shape:
            close(written.double(), expected, 1e-5)
        assert not written.requires_grad and torch.isfinite(written).all()

    def test_an_empty_batch_changes_nothing(self, name):
        estimator = build(name)
        batch = batch_of(estimator, rows())
        state = estimator.update(estimator.init(batch), batch)
        again = estimator.update(state, batch.select(slice(0, 0)))
        assert torch.equal(estimator.score(again)["score"].nan_to_num(), estimator.score(state)["score"].nan_to_num())

    def test_an_update_leaves_the_state_before_it_alone(self, name):
        estimator = build(name)
        batch = batch_of(estimator, rows())
        state = estimator.update(estimator.init(batch), batch.select(slice(0, 40)))
        before = estimator.score(state)["score"].clone()
        estimator.update(state, batch.select(slice(40, N)))
        assert torch.equal(before.nan_to_num(), estimator.score(state)["score"].nan_to_num())

    def test_every_leading_dimension_is_a_data_set(self, name):
        both = [torch.stack(pair) for pair in zip(rows(), rows(1), strict=True)]
        known = torch.stack([targets(name), targets(name, 1)])
        found = score(name, both, known)
        assert found.shape[0] == 2
        close(found[0], score(name, rows(), targets(name)), 1e-9)
        close(found[1], score(name, rows(1), targets(name, 1)), 1e-9)


@pytest.mark.parametrize("name", NAMES)
class TestValues:
    @pytest.mark.parametrize("shift", [0.0, 1.0])
    def test_float32_agrees_with_float64_at_any_offset(self, name, shift):
        offset = shift * row_of(name).shift
        exact = score(name, [x + offset for x in rows(kind=torch.float32)] if not shift else _shifted(offset))
        kept = [x.float() for x in ([x + offset for x in rows(kind=torch.float32)] if not shift else _shifted(offset))]
        close(score(name, kept), exact.double(), 1e-4)

    @pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_more(self, name, kind):
        layers = rows(kind=kind)
        close(score(name, layers), score(name, [x.float() for x in layers]), 1e-4)

    def test_layers_of_several_dtypes_are_promoted(self, name):
        layers = [x.to(kind) for x, kind in zip(rows(), (torch.bfloat16, torch.float64, torch.float32), strict=True)]
        found = score(name, layers)
        assert found.dtype == torch.float64
        close(found, score(name, [x.double() for x in layers]), 1e-4)

    def test_bounds_hold(self, name):
        low, high = class_of(name).spec.bounds
        for seed in range(5):
            found = score(name, rows(seed))
            assert torch.isfinite(found).all()
            slack = 1e-9 if getattr(build(name), "mode", "strict") == "strict" else 0.5
            assert (found >= low - slack).all() and (found <= high + slack).all()

    def test_symmetric_or_not(self, name):
        spec = class_of(name).spec
        if spec.kind != "pair":
            assert not spec.symmetric or spec.kind == "layer"
            return
        found = score(name, rows())
        gap = (found - found.mT).abs().max()
        assert gap < 1e-9 if spec.symmetric else gap > 1e-4

    @pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
    def test_scores_stay_on_the_device(self, name, device):
        found = score(name, [x.to(device) for x in rows()], targets(name).to(device))
        assert found.device.type == device
        close(found.cpu(), score(name, rows(), targets(name)), 1e-8)


@pytest.mark.parametrize("name", NAMES)
class TestStreamingForm:
    """What a name stands for in a stream: minibatches, the robust mode."""

    def test_declared_properties_hold_here_too(self, name):
        estimator = streaming(name)

        def values(layers):
            batch = batch_of(estimator, layers, targets(name) if estimator.target_keys else None)
            return estimator.score(estimator.update(estimator.init(batch), batch))["score"]

        before = values(rows())
        if estimator.spec.kind == "pair" and estimator.spec.symmetric:
            close(before, before.mT, 1e-9)
        for change in estimator.spec.invariant_to:
            close(values([_changed(x, change) for x in rows()]), before, 1e-7)


def streaming(name):
    return registry.streaming(name) if name != "foreign_spread" else build(name)


def _shifted(offset):
    # What float32 can hold of rows at an offset is what both must agree on.
    return [(x.double() + offset).float().double() for x in rows()]


@pytest.mark.parametrize("name", NAMES)
class TestInvariances:
    @pytest.mark.parametrize("change", INVARIANCES)
    def test_declared_ones_hold_and_others_do_not(self, name, change):
        spec, before = class_of(name).spec, score(name, rows())
        moved = []
        for place in range(2 if spec.kind == "pair" else 1):
            layers = rows()
            layers[place] = _changed(layers[place], change)
            after = score(name, layers)
            gap = (after - before).abs()
            moved.append(gap[0, 1] if spec.kind == "pair" else gap[0].max())
        if change in spec.invariant_to:
            assert max(moved) < 1e-7
        elif change not in row_of(name).unaffected:
            assert max(moved) > 1e-4


def _changed(x, change):
    g = torch.Generator().manual_seed(5)
    square = torch.randn(x.shape[1], x.shape[1], generator=g, dtype=torch.float64)
    return {
        "permutation": lambda: x[:, torch.randperm(x.shape[1], generator=g)],
        "orthogonal": lambda: x @ torch.linalg.qr(square).Q,
        "isotropic scaling": lambda: 3.7 * x,
        "translation": lambda: x + torch.linspace(-2, 5, x.shape[1], dtype=torch.float64),
        "invertible linear": lambda: x @ (square + 2 * torch.eye(x.shape[1], dtype=torch.float64)),
    }[change]()


@pytest.mark.parametrize("name", NAMES)
class TestDegenerate:
    def test_too_few_rows_are_an_error_or_nan(self, name):
        least = row_of(name).least
        layers = [x[: least - 1] for x in rows()]
        try:
            found = score(name, layers, targets(name)[: least - 1])
        except ConfigError as error:
            assert str(least) in str(error) and str(least - 1) in str(error)
        else:
            assert found.isnan().all()

    def test_nan_stays_in_its_layer(self, name):
        layers = rows()
        layers[1][7, 0] = math.nan
        found, spec = score(name, layers), class_of(name).spec
        clean = score(name, rows())
        if spec.kind == "pair":
            assert found[1].isnan().all() and found[:, 1].isnan().all()
            close(found[0, 2], clean[0, 2], 1e-9)
        else:
            assert found[1].isnan().all()
            close(found[0], clean[0], 1e-9)

    def test_a_constant_layer_is_named_by_nan_or_a_limit(self, name):
        layers = rows()
        layers[1] = torch.full_like(layers[1], 2.5)
        found, clean = score(name, layers), score(name, rows())
        assert not found[1].isinf().any()
        keep = (0, 2) if class_of(name).spec.kind == "pair" else (0,)
        close(found[keep], clean[keep], 1e-9)

    def test_a_layer_may_repeat_its_rows_and_says_how_often(self, name):
        layers = rows()
        layers[1] = layers[1][torch.arange(N) % 30]
        estimator = build(name)
        batch = batch_of(estimator, layers)
        found = estimator.score(estimator.update(estimator.init(batch), batch))
        assert not found["score"].isinf().any()
        if "duplicates" in found.keys():
            assert found["duplicates"].tolist() == [0, 30, 0]

    def test_repeated_rows_give_a_finite_score(self, name):
        layers = [torch.cat([x, x[:20]]) for x in rows()]
        found = score(name, layers, torch.cat([targets(name), targets(name)[:20]]))
        low, high = class_of(name).spec.bounds
        assert torch.isfinite(found).all() and (found >= low - 0.5).all() and (found <= high + 0.5).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_state_survives_storage_half_way(name, tmp_path):
    estimator = build(name)
    batch = batch_of(estimator, rows())
    half = estimator.update(estimator.init(batch), batch.select(slice(0, 33)))
    half.save(tmp_path / "half", statistic=estimator.statistic())
    half.memmap(tmp_path / "map")
    rest = batch.select(slice(33, N))
    expected = estimator.score(estimator.update(half, rest))["score"].nan_to_num()
    for state in (
        load_state(tmp_path / "half", estimator.statistic()),
        type(half).load_memmap(tmp_path / "map"),
    ):
        assert torch.equal(estimator.score(estimator.update(state, rest))["score"].nan_to_num(), expected)


def test_the_foreign_estimator_came_in_by_its_entry_point():
    cls = class_of("foreign_spread")
    assert cls.__module__ == "foreign_spread_package" and cls.spec.name == "foreign_spread"
