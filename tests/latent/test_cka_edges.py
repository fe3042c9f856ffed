"""CKA at the edges: degenerate, empty, ill-shaped and unusual input."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from tdprobe.errors import ConfigError
from tdprobe.latent.representation_similarity import CkaEstimator, cka_matrix

VARIANTS = [{}, {"unbiased": True}, {"minibatch": True}, {"unbiased": True, "minibatch": True}]


def cka(a, b, **options):
    return CkaEstimator(**options)(TensorDict({"data_a": a, "data_b": b}))["cka"]


def pair(n=80, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    b = torch.cat([a[:, :3] ** 2 + a[:, 3:], torch.randn(n, 4, generator=generator, dtype=torch.float64)], 1)
    return a.to(dtype), b.to(dtype)


class TestDegenerate:
    @pytest.mark.parametrize("options", VARIANTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_constant_columns_are_nan_even_with_rounding_noise(self, dtype, options):
        a, b = pair(dtype=dtype)
        constant = torch.full_like(a, 0.1)
        noisy = constant * (1 + torch.finfo(dtype).eps * torch.randn_like(a).sign())
        assert cka(constant, b, **options).isnan() and cka(b, noisy, **options).isnan()
        assert cka(torch.zeros_like(a), b, **options).isnan()
        assert cka(a[:, :0], b, **options).isnan()

    @pytest.mark.parametrize("options", VARIANTS)
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_nan_in_nan_out(self, bad, options):
        a, b = pair()
        a[3, 2] = bad
        assert cka(a, b, **options).isnan()
        assert not cka(b, b, **options).isnan()

    def test_eps_is_a_relative_variance(self):
        a, b = pair()
        shifted = a - a.mean(0) + 1000
        assert not cka(shifted, b, eps=1e-7).isnan() and cka(shifted, b, eps=1e-3).isnan()

    def test_one_row_or_none_has_no_variance(self):
        assert cka(torch.randn(1, 3), torch.randn(1, 2)).isnan()
        assert cka(torch.zeros(0, 3), torch.zeros(0, 2)).isnan()

    @pytest.mark.parametrize("options", VARIANTS)
    def test_an_empty_batch_gives_an_empty_result(self, options):
        td = TensorDict({"data_a": torch.zeros(0, 9, 3), "data_b": torch.zeros(0, 9, 2)}, batch_size=[0])
        result = CkaEstimator(**options)(td)["cka"]
        assert result.shape == (0,) and result.dtype == torch.float32

    @pytest.mark.parametrize("minibatch", [True, False])
    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_too_few_rows_for_the_unbiased_value(self, n, minibatch):
        with pytest.raises(ConfigError, match=f"got {n} rows.*at least 4"):
            cka(torch.randn(n, 1), torch.randn(n, 1), unbiased=True, minibatch=minibatch)


class TestErrors:
    def test_shapes_that_do_not_go_together_name_both_keys(self):
        with pytest.raises(ValueError, match="'data_a' has number of samples 20 and 'data_b' has 10"):
            cka(torch.zeros(20, 3), torch.zeros(10, 3))
        with pytest.raises(ValueError, match=r"leading dimensions \(2,\) and 'data_b' has \(3,\)"):
            cka(torch.zeros(2, 9, 3), torch.zeros(3, 9, 3))
        with pytest.raises(ValueError, match="device cpu and 'data_b' has meta"):
            cka(torch.zeros(9, 3), torch.zeros(9, 3, device="meta"))
        with pytest.raises(ValueError, match="'data_b' has shape"):
            cka(torch.zeros(9, 3), torch.zeros(9))
        with pytest.raises(ValueError, match="complex"):
            cka(torch.zeros(9, 3) * 1j, torch.zeros(9, 3))

    def test_arguments_are_checked_at_construction(self):
        with pytest.raises(NotImplementedError, match=r"kernel='poly'.*'linear' and 'rbf'"):
            CkaEstimator(kernel="poly")
        with pytest.raises(ValueError, match="eps=-1"):
            CkaEstimator(eps=-1)
        with pytest.raises(ValueError, match="eps=nan"):
            CkaEstimator(eps=float("nan"))


@pytest.mark.parametrize("options", VARIANTS)
def test_autocast_and_inference_mode_are_the_models_business(options):
    a, b = pair(dtype=torch.float32)
    plain = cka(a, b, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert torch.equal(cka(a, b, **options), plain)
        tracked = a.clone()
    assert not cka(tracked, b, **options).requires_grad
    assert not cka(a.clone().requires_grad_(), b, **options).requires_grad


def test_a_key_may_be_compared_with_itself():
    td = TensorDict({"x": torch.randn(9, 3)})
    assert CkaEstimator("x", "x")(td)["cka"].item() == pytest.approx(1.0)


def test_matrix_names_a_layer_of_another_length():
    with pytest.raises(ConfigError, match="'layer 2' has 8 rows"):
        cka_matrix([torch.zeros(9, 2), torch.zeros(9, 2), torch.zeros(8, 2)])
    with pytest.raises(ConfigError, match="without layers"):
        cka_matrix([])
