"""The disentanglement estimators: one shot, streams, hooked models, and what they share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from tdprobe import registry
from tdprobe.errors import ConfigError, MissingKeyError
from tdprobe.latent import LayerScoring
from tdprobe.latent import disentanglement as d
from tdprobe.latent.disentanglement.gaps import best_dims
from tdprobe.latent.disentanglement.information import Information
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.scorer import Scorer
from tdprobe.stream.batch import Batch

NAMES = ("mig", "dmig", "dlig", "xmig", "modularity", "sap", "dci")
GAPS = ("mig", "dmig", "dlig", "xmig")
IDS = torch.arange(10_000) * 7919


def data(n=120, d=6, m=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g, dtype=torch.float64)
    a = z[:, [3, 1, 0][:m]] + 0.5 * z[:, :m] + 0.2 * torch.randn(n, m, generator=g, dtype=torch.float64)
    return z, a


def one_shot(name, z, a, **options):
    td = TensorDict({"latents": z, "attributes": a}, batch_size=z.shape[:-2])
    return registry.get(name)(**options)(td)[name]


def pushed(scorer, rows, targets, size=17):
    n = len(next(iter(rows.values())))
    for start in range(0, n, size):
        part = slice(start, start + size)
        known = {key: value[part] for key, value in targets.items()}
        scorer.push(Batch({name: x[part] for name, x in rows.items()}, IDS[:n][part], known))
    return scorer


class TestOneShot:
    @pytest.mark.parametrize("name", ["dmig", "dlig", "xmig"])
    def test_with_given_units_it_is_the_function(self, name):
        z, a = data()
        found = one_shot(name, z, a, reg_dim=[3, 1])
        torch.testing.assert_close(found, getattr(d, name)(z, a, [3, 1]).float())
        assert torch.equal(one_shot(name, z, a), found)  # 3 and 1 are the best

    def test_gaps_without_units_modularity_sap_and_dci(self):
        z, a = data()
        torch.testing.assert_close(one_shot("mig", z, a), d.mig(z, a).float())
        torch.testing.assert_close(one_shot("mig", z, a, reg_dim=(3, 0)), d.mig(z, a, [3, 0]).float())
        torch.testing.assert_close(one_shot("sap", z, a), d.sap(z, a).float())
        by_unit, most = d.modularity(z, a), d.mutual_information(z, a).amax(1)
        expected = ((by_unit * most).sum() / most.sum()).reshape(1)
        torch.testing.assert_close(one_shot("modularity", z, a), expected.float())
        found = d.dci(z, a)
        for measure, key in (("completeness", "by_attribute"), ("informativeness", "informativeness")):
            torch.testing.assert_close(one_shot("dci", z, a, measure=measure), found[key].float())
        torch.testing.assert_close(one_shot("dci", z, a), found["disentanglement"].float().reshape(1))

    @pytest.mark.parametrize("normalizer", ["binned", "none"])
    def test_normalizers(self, normalizer):
        z, a = data()
        found = one_shot("mig", z, a, normalizer=normalizer)
        torch.testing.assert_close(found, d.mig(z, a, normalizer=normalizer).float())

    @pytest.mark.parametrize("name", NAMES)
    def test_leading_dimensions_are_data_sets(self, name):
        (z, a), (y, b) = data(60), data(60, seed=1)
        found = one_shot(name, torch.stack([z, y]), torch.stack([a, b]))
        assert torch.equal(found[0], one_shot(name, z, a)) and torch.equal(found[1], one_shot(name, y, b))

    def test_labels_and_several_keys(self):
        z, a = data()
        labels = (a[:, 0] > 0).long()
        estimator = d.MigEstimator(attributes=["size", "kind"], discrete=[False, True], out_key=("out", "mig"))
        td = estimator(TensorDict({"latents": z, "size": a[:, 1:], "kind": labels}))
        expected = d.mig(z, torch.stack([a[:, 1], labels], 1), discrete=[False, True])
        torch.testing.assert_close(td["out", "mig"], expected.float())
        assert estimator.target_names(2) == ("size", "kind")
        assert "attributes=['size', 'kind']" in repr(estimator)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_half_precision_counts_as_it_is(self, name, dtype):
        z, a = (x.to(dtype) for x in data(60))
        assert torch.equal(one_shot(name, z, a), one_shot(name, z.double(), a.double()))


class TestBestUnits:
    def test_by_hand(self):
        matrix = torch.tensor([[0.9, 0.8], [0.5, 0.1], [0.0, 0.3]])
        # Attribute 0 takes unit 0, so that attribute 1 gets the best of the others.
        assert best_dims(matrix) == (0, 2)
        assert best_dims(torch.tensor([[0.7, 0.8], [0.5, 0.1]])) == (1, 0)
        assert best_dims(torch.zeros(3, 2)) == (0, 1)


class TestStream:
    @pytest.mark.parametrize("name", NAMES)
    def test_odd_batches_are_one_shot(self, name):
        z, a = data(90)
        found = pushed(Scorer(resolve_estimators([name]), portion=10), {"x": z, "y": 3 - 2 * z}, {"attributes": a})
        score = found.scores()[name]
        torch.testing.assert_close(score[0].float(), one_shot(name, z, a), rtol=1e-5, atol=1e-6)
        if name != "dci":
            torch.testing.assert_close(score[0], score[1])

    def test_the_bank_bounds_what_is_kept_and_holds_the_same_rows(self):
        z, a = data(300)
        scorer = pushed(
            Scorer(resolve_estimators([d.MigEstimator(bank_size=80)]), portion=50), {"x": z}, {"attributes": a}
        )
        state = scorer.states()["mig"]
        assert int(state.n) == 80
        kept = (IDS[:300].unsqueeze(0) == state.ids.unsqueeze(1)).nonzero()[:, 1]
        torch.testing.assert_close(scorer.scores()["mig"][0], d.mig(z[kept], a[kept]))

    def test_all_share_one_matrix_per_layer(self, monkeypatch):
        z, a = data(80)
        made, latent = [], Information.latent
        monkeypatch.setattr(Information, "latent", lambda self, x: made.append(x.shape) or latent(self, x))
        scorer = pushed(Scorer(resolve_estimators([*NAMES]), groups=0), {"x": z, "y": z[:, :4]}, {"attributes": a})
        found = scorer.scores()
        assert made == [(80, 6), (80, 4)]
        assert [tuple(found[name].shape) for name in NAMES] == [(2, 2)] * 4 + [(2, 1), (2, 2), (2, 1)]
        labels = d.MigEstimator(discrete=True)
        assert labels.derivation(None).joined(d.MigEstimator().derivation(None)) is None
        assert labels.derivation(None).joined(3) is None

    def test_merging_two_streams_is_one_stream(self):
        z, a = data(100)
        estimator = d.DmigEstimator(bank_size=64)
        batches = [Batch({"x": z[i : i + 50]}, IDS[i : i + 50], {"attributes": a[i : i + 50]}) for i in (0, 50)]
        one, two = (estimator.update(estimator.init(batch), batch) for batch in batches)
        both = estimator.update(one, batches[1])
        assert torch.equal(estimator.score(one.merge(two))["score"], estimator.score(both)["score"])


class TestHookedModels:
    def model(self):
        torch.manual_seed(0)
        turn = nn.Linear(3, 3, bias=False)
        turn.weight.data = torch.linalg.qr(torch.randn(3, 3)).Q
        return nn.Sequential(nn.Identity(), turn).double()

    def test_a_turned_layer_mixes_what_the_one_before_kept_apart(self):
        z = torch.randn(600, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with LayerScoring(r"\d", [*NAMES]).prepare(self.model()) as hooked:
            for part in z.split(130):
                hooked(part, attributes=part[:, :2])
        table = hooked.hooking_context.scores()
        for name in ("mig", "dmig", "xmig", "sap", "dlig", "dci"):
            values = table.block(name).values
            assert values[0].min() > 0.8 and values[1].max() < 0.65, name
        assert table.block("mig").layers_b == ("attributes[0]", "attributes[1]")
        assert table.block("mig").route == "bank of 4096 rows"

    def test_attributes_of_texts_and_rows_that_repeat(self, tiny_llama):
        # A causal model gives identical rows for identical prefixes; empty masks leave no row.
        ids = torch.randint(1, 60, (24, 5), generator=torch.Generator().manual_seed(0))
        ids[12:] = ids[:12]
        mask = torch.ones_like(ids)
        mask[3] = 0
        size = torch.arange(24.0)
        scoring = LayerScoring(r"model\.layers\.\d+$", ["mig", "dmig"], tokens="last", skip_first=0)
        with scoring.prepare(tiny_llama) as hooked, torch.no_grad():
            for part in (slice(0, 7), slice(7, 8), slice(8, 24)):
                hooked(input_ids=ids[part], attention_mask=mask[part], attributes=size[part])
        context = hooked.hooking_context
        values = context.scores().block("mig").values
        assert context.n_rows == 23 and values.shape == (4, 1) and np.isfinite(values).all()


class TestDegenerate:
    @pytest.mark.parametrize("name", NAMES)
    def test_layers_that_are_not_finite_are_nan_and_named(self, name):
        z, a = data(60)
        bad = z.clone()
        bad[7, 2] = torch.nan
        scorer = pushed(Scorer(resolve_estimators([name]), groups=0), {"good": z, "bad": bad}, {"attributes": a})
        with pytest.warns(UserWarning, match="'bad' held NaN or infinite values"):
            score = scorer.scores()[name]
        assert score[0].isfinite().all() and score[1].isnan().all()

    @pytest.mark.parametrize("name", NAMES)
    def test_attributes_that_are_not_finite_are_refused(self, name):
        z, a = data(60)
        a[3:5, 1] = torch.nan
        with pytest.raises(ConfigError, match="2 values of attribute 1 are NaN or infinite"):
            one_shot(name, z, a)

    @pytest.mark.parametrize("name", [*GAPS, "sap"])
    def test_constant_attributes_are_nan_and_named(self, name):
        z, a = data(60)
        a[:, 1] = 2
        with pytest.warns(UserWarning, match=rf"{name}: .*'attributes\[1\]' is NaN"):
            assert one_shot(name, z, a)[1].isnan()

    @pytest.mark.parametrize("name", NAMES)
    def test_too_few_rows_units_or_attributes(self, name):
        z, a = data(60)
        with pytest.raises(ConfigError, match="got 3 rows"):
            one_shot(name, z[:3], a[:3])
        if name in ("dlig", "modularity", "dci"):
            with pytest.raises(ConfigError, match=f"{name} got a layer of 6 units and 1 attributes.*needed are 2"):
                one_shot(name, z, a[:, :1])
        else:
            assert one_shot(name, z, a[:, 0]).shape == (1,)
        if name in (*GAPS, "sap"):
            with pytest.raises(ConfigError, match="got a layer of 1 units and 2 attributes; needed are"):
                one_shot(name, z[:, :1], a)
        else:
            assert one_shot(name, z[:, :2], torch.cat([a, a[:, :1]], 1)).isfinite().all()

    def test_xmig_needs_a_unit_without_attribute(self):
        z, a = data(60)
        with pytest.raises(ConfigError, match="xmig got a layer of 2 units and 2 attributes; needed are 3 units"):
            one_shot("xmig", z[:, :2], a)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: d.MigEstimator(normalizer="bins"), "did you mean 'binned'"),
            (lambda: d.DmigEstimator(reg_dim=None), "reg_dim=None"),
            (lambda: d.MigEstimator(reg_dim="first"), "reg_dim='first'"),
            (lambda: d.MigEstimator(bank_size=0), "size=0"),
            (lambda: d.SapEstimator(l2_reg=-1), "l2_reg=-1"),
            (lambda: d.DciEstimator(measure="complete"), "did you mean 'completeness'"),
            (lambda: d.DciEstimator(model="trees"), "unknown model 'trees'"),
            (lambda: d.DciEstimator(alpha=0), "alpha=0"),
            (lambda: one_shot("mig", *data(60), reg_dim=[0]), r"reg_dim has shape \(1,\)"),
            (lambda: one_shot("mig", *data(60), discrete=[True]), "one bool for each of 2 attributes"),
            (lambda: one_shot("sap", *data(60), discrete=True), "integer labels"),
        ],
    )
    def test_arguments(self, make, message):
        with pytest.raises(ConfigError, match=message):
            make()

    def test_attributes_that_did_not_come(self):
        with pytest.raises(
            MissingKeyError,
            match=r"MigEstimator reads 'attributes' .* nothing came along; bring it with each call .*attributes=\.\.\.",
        ):
            Scorer(resolve_estimators(["mig"])).push(Batch({"x": torch.randn(9, 3)}, IDS[:9]))


class TestInvariance:
    @settings(max_examples=8, deadline=None)
    @given(st.integers(0, 10**6), st.floats(-2, 2))
    # Two units of which neither tells anything, and only one belongs to an attribute.
    @example(seed=259, power=0.0)
    def test_declared_ones_hold(self, seed, power):
        z, a = data(70, seed=seed % 50)
        g = torch.Generator().manual_seed(seed)
        changed = {
            "permutation": z[:, torch.randperm(6, generator=g)],
            "isotropic scaling": 10**power * z,
            "translation": z + torch.randn(6, generator=g, dtype=torch.float64),
        }
        for name in NAMES:
            spec = registry.get(name).spec
            assert spec.kind == "supervised" and set(spec.invariant_to) <= set(changed)
            plain = one_shot(name, z, a)
            for kind in spec.invariant_to:
                torch.testing.assert_close(one_shot(name, changed[kind], a), plain, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", NAMES)
    def test_turning_the_axes_is_no_such_change(self, name):
        z, _ = data(300)
        turned = z @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()).Q
        before, after = (one_shot(name, x, z[:, :2]) for x in (z, turned))
        assert "orthogonal" not in registry.get(name).spec.invariant_to
        assert ((before - after).abs() > 0.05).all()
