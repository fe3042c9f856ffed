"""Differences between two sides, whose every value is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdprobe.errors import TdprobeError
from tdprobe.latent import ActivationAddition, SteeringVectors


class Double(nn.Module):
    """Two modules: 2 x and then x squared."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Identity()
        self.first.weight.data = 2 * torch.eye(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) ** 2)


def sides(positive: Tensor, negative: Tensor, batch: Any, keys: Any = ("positive", "negative")) -> TensorDict:
    td = TensorDict({}, batch_size=batch)
    for key, value in zip(keys, (positive, negative), strict=True):
        td.set((*([key] if isinstance(key, str) else key), "input"), value)
    return td


def vectors(factory: ActivationAddition, td: TensorDict, model: nn.Module | None = None) -> TensorDict:
    with factory.prepare(model or Double()) as hooked:
        return hooked(td)


def all_keys(td: TensorDict) -> set[Any]:
    return set(td.keys(include_nested=True, leaves_only=True))


@pytest.mark.parametrize(
    ("shape", "batch"),
    [((5, 3), [5]), ((2, 4, 3), [2]), ((2, 4, 3), [2, 4]), ((3,), []), ((2, 3), []), ((2, 2, 4, 3), [2, 2])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_is_over_the_batch_dimensions_only(shape: Any, batch: Any, dtype: torch.dtype) -> None:
    positive, negative = torch.randn(2, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    td = sides(positive, negative, batch)
    result = vectors(ActivationAddition(["first", "second"]), td, Double().to(dtype))
    mean = (lambda value: value.flatten(0, len(batch) - 1).mean(0)) if batch else (lambda value: value)
    torch.testing.assert_close(result["steer", "first"], mean(2 * positive - 2 * negative))
    torch.testing.assert_close(result["steer", "second"], mean(4 * positive**2 - 4 * negative**2))
    assert result.batch_size == torch.Size([]) and all_keys(result) == {("steer", "first"), ("steer", "second")}
    assert all_keys(td) == {("positive", "input"), ("negative", "input")}


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("keys", [("yes", "no", "v"), (("a", "p"), ("a", "n"), ("a", "v"))])
def test_keys_may_be_named_and_nested(keys: Any, clean: bool) -> None:
    x = torch.ones(2, 3)
    td = sides(x, -x, [2], keys[:2])
    result = vectors(ActivationAddition(["first"], *keys, clean), td)
    path = (keys[2],) if isinstance(keys[2], str) else keys[2]
    assert all_keys(result) == {(*path, "first")} and result[(*path, "first")].tolist() == [4, 4, 4]


def test_keys_of_the_hooked_module() -> None:
    with ActivationAddition(["first"], required=False).prepare(Double()) as hooked:
        assert hooked.in_keys == [("positive", "input"), ("negative", "input")]
        assert hooked.out_keys == [("steer", "first")]


def test_cache_callback_gives_the_value() -> None:
    seen = []

    def last(*, module: nn.Module, args: Any, output: Tensor, key: str, direction: str) -> Tensor:
        seen.append((type(module).__name__, key, direction))
        return output[..., -1, :]

    positive, negative = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    result = vectors(ActivationAddition(["first"], cache_callback=last), sides(positive, negative, [2]))
    torch.testing.assert_close(result["steer", "first"], 2 * (positive - negative)[:, -1].mean(0))
    assert seen == [("Linear", "first", "fwd")] * 2


@pytest.mark.parametrize("missing", ["positive", "negative"])
def test_a_missing_side_is_a_key_error(missing: str) -> None:
    td = sides(torch.ones(2, 3), torch.ones(2, 3), [2]).exclude(missing)
    with pytest.raises(KeyError, match=f"has no '{missing}'") as caught:
        vectors(ActivationAddition(["first"], required=False), td)
    assert isinstance(caught.value, TdprobeError)


def test_a_call_with_one_input_is_refused() -> None:
    with ActivationAddition(["first"], required=False).prepare(Double()) as hooked:
        for call in (lambda: hooked(torch.ones(2, 3)), lambda: hooked(input=torch.ones(2, 3))):
            with pytest.raises(RuntimeError, match=r"hooked\.contrast\(positive, negative\)"):
                call()


def test_the_vectors_go_straight_into_steering() -> None:
    model, x = Double(), torch.ones(4, 3)
    steer = vectors(ActivationAddition(["first"]), sides(2 * x, x, [4]), model)["steer"]
    with SteeringVectors(["first"], vector=steer).prepare(model) as hooked:
        moved = hooked(x)
    assert torch.equal(moved, model(2 * x))


def test_values_whose_first_axis_is_not_the_batch_are_refused() -> None:
    td = sides(torch.ones(2, 4, 3), torch.ones(2, 4, 3), [2])
    model = nn.Sequential(nn.Flatten(0, 1), nn.Unflatten(0, (2, 4)))
    with pytest.raises(ValueError, match=r"\(8, 3\), whose first axis is not that of the 2 samples"):
        vectors(ActivationAddition(["[0]"], required=False), td, model)


def test_a_module_that_runs_on_one_side_only_is_an_error() -> None:
    class Sometimes(Double):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) if x.sum() > 0 else x

    with pytest.raises(RuntimeError, match="'first' did not run on both sides"):
        vectors(ActivationAddition(["first"]), sides(torch.ones(2, 3), -torch.ones(2, 3), [2]), Sometimes())


def test_the_last_run_of_a_repeated_module_counts_and_the_first_with_early_stop() -> None:
    class Twice(Double):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.first(x))

    td = sides(torch.ones(2, 3), torch.zeros(2, 3), [2])
    for early, expected in ((False, 4), (True, 2)):
        result = vectors(ActivationAddition(["first"], early_stop=early), td, Twice())
        assert result["steer", "first"].tolist() == [expected] * 3


def test_early_stop_ends_both_passes_after_the_last_module() -> None:
    model, ran = Double(), []
    model.second.register_forward_hook(lambda *_: ran.append(1))
    td = sides(torch.ones(2, 3), torch.zeros(2, 3), [2])
    assert vectors(ActivationAddition(["first"], early_stop=True), td, model)["steer", "first"].tolist() == [2, 2, 2]
    assert not ran
    vectors(ActivationAddition(["first"]), td, model)
    assert len(ran) == 2


def test_differences_of_bf16_values_are_taken_in_float32() -> None:
    # 258 - 1 is no bfloat16, and 257 would be rounded down to 256 in every row.
    positive = torch.tensor([258.0, 258.0, 258.0, 262.0], dtype=torch.bfloat16)[:, None]
    td = sides(positive, torch.ones_like(positive), [4])
    result = vectors(ActivationAddition(["0"]), td, nn.Sequential(nn.Identity()))
    assert result["steer", "0"].dtype == torch.bfloat16 and result["steer", "0"].tolist() == [258]


# Tokens.


class Tokens(nn.Module):
    """(batch, tokens) ids to (batch, tokens, 2) values, each token on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = input_ids[..., None].float()
        return self.layer(torch.cat([x, -x], -1))


POSITIVE = {"input_ids": torch.tensor([[0, 11, 12, 13], [21, 22, 23, 24]])}
NEGATIVE = {"input_ids": torch.tensor([[1, 2, 0], [3, 4, 5]])}
for side in (POSITIVE, NEGATIVE):
    side["attention_mask"] = (side["input_ids"] > 0).long()


@pytest.mark.parametrize(
    ("tokens", "skip_first", "expected"),
    [
        ("last", 0, (13 + 24) / 2 - (2 + 5) / 2),
        ("mean", 0, (12 + 22.5) / 2 - (1.5 + 4) / 2),
        ("all", 0, (11 + 12 + 13 + 21 + 22 + 23 + 24) / 7 - (1 + 2 + 3 + 4 + 5) / 5),
        (0, 0, (11 + 21) / 2 - (1 + 3) / 2),
        (None, 1, (12 + 13 + 22 + 23 + 24) / 5 - (2 + 4 + 5) / 3),
    ],
)
def test_vectors_of_selected_tokens_have_the_width_of_the_layer(tokens: Any, skip_first: int, expected: float) -> None:
    factory = ActivationAddition(["layer"], tokens=tokens, skip_first=skip_first)
    with factory.prepare(Tokens()) as hooked:
        result = hooked.contrast(POSITIVE, NEGATIVE)
        td = TensorDict({"positive": POSITIVE, "negative": NEGATIVE}, batch_size=[2])
        assert torch.equal(hooked(td)["steer", "layer"], result["steer", "layer"])
    torch.testing.assert_close(result["steer", "layer"], torch.tensor([expected, -expected]))


def test_contrast_without_tokens_is_the_mean_over_the_batch() -> None:
    ids = {"input_ids": NEGATIVE["input_ids"]}
    with ActivationAddition(["layer"]).prepare(Tokens()) as hooked:
        doubled = hooked.contrast({"input_ids": 2 * ids["input_ids"]}, ids)["steer", "layer"]
        with pytest.raises(ValueError, match=r"\(2, 4, 2\) on the positive and \(2, 3, 2\) on the negative"):
            hooked.contrast(POSITIVE, NEGATIVE)
    assert doubled[:, 0].tolist() == [2, 3, 2.5]


# Directions.


def test_uncentred_pca_finds_the_common_direction_with_its_sign_and_size() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = torch.tensor([3.0, 4.0, 0.0]) / 5
    negative = torch.randn(200, 3, generator=generator)
    positive = negative + 7 * direction + 0.3 * torch.randn(200, 3, generator=generator)
    factory = ActivationAddition(["0"], method="pca")
    found = vectors(factory, sides(positive, negative, [200]), nn.Sequential(nn.Identity()))["steer", "0"]
    rows = (positive - negative).double()
    # An independent way: the leading eigenvector of the second moments.
    leading = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    expected = leading * (leading @ rows.mean(0))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.cosine_similarity(found, direction, dim=0) > 0.999 and found.norm() == pytest.approx(7, abs=0.2)
    # Centred, the direction that all pairs share would be gone.
    centred = torch.linalg.svd(rows - rows.mean(0)).Vh[0].float()
    assert torch.cosine_similarity(centred, direction, dim=0).abs() < 0.9


def test_swapping_the_sides_turns_the_direction_round() -> None:
    positive, negative = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(1))
    for method in ("mean_difference", "pca"):
        factory, model = ActivationAddition(["0"], method=method), nn.Sequential(nn.Identity())
        there = vectors(factory, sides(positive, negative, [50]), model)["steer", "0"]
        back = vectors(factory, sides(negative, positive, [50]), model)["steer", "0"]
        torch.testing.assert_close(there, -back)


def test_pca_needs_pairs() -> None:
    with ActivationAddition(["layer"], tokens="all", method="pca").prepare(Tokens()) as hooked:
        with pytest.raises(ValueError, match=r"rows of tokens='all' at 'layer' have shape \(7, 2\).*\(5, 2\)"):
            hooked.contrast(POSITIVE, NEGATIVE)
    with pytest.raises(ValueError, match="not that of the \\(no\\) samples"):
        vectors(
            ActivationAddition(["0"], method="pca"),
            sides(torch.ones(3), torch.zeros(3), []),
            nn.Sequential(nn.Identity()),
        )
    with pytest.raises(RuntimeError, match="not all finite"):
        infinite = torch.full((2, 3), torch.inf)
        vectors(
            ActivationAddition(["0"], method="pca"), sides(infinite, infinite * 0, [2]), nn.Sequential(nn.Identity())
        )


@pytest.mark.parametrize(
    ("given", "problem"),
    [({"method": "lda"}, "'mean_difference', 'pca', got 'lda'"), ({"tokens": "frist"}, "unknown token selection")],
)
def test_bad_arguments_are_refused(given: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ActivationAddition(["first"], **given)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_run_leaves_nothing(error: Any, hooks_of: Any) -> None:
    model, armed = Double(), [True]

    def fail(output: Tensor, **_: Any) -> Tensor:
        if armed:
            raise error("callback")
        return output

    td = sides(torch.ones(2, 3), torch.zeros(2, 3), [2])
    with ActivationAddition(["first"], cache_callback=fail).prepare(model) as hooked:
        with pytest.raises(error, match="callback"):
            hooked(td)
        armed.clear()
        model(torch.ones(2, 3))
        assert hooked(td)["steer", "first"].tolist() == [2, 2, 2]
    assert hooks_of(model) == 0 and hooked.hooking_context.n_fired == {"first": 2}
