"""Noise at named modules, on models whose every value is known."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdprobe.contexts import CompositeHookingContextFactory
from tdprobe.errors import TdprobeError
from tdprobe.latent import ActivationCaching, NoisedInformation, SteeringVectors
from tdprobe.latent.information import kolchinsky_tracey_bounds
from tdprobe.tables import ScoreTable

PLAIN = {"skip_first": 0, "max_norm": None}


class Tokens(nn.Module):
    """(batch, tokens) ids to (batch, tokens, 2) values, each token on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()
        self.table = nn.Embedding(50, 2)
        self.table.weight.data = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor(
            [1.0, 30]
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.second(2 * self.first(self.table(input_ids)))


IDS = torch.tensor([[3, 7, 9, 12], [21, 22, 0, 0], [33, 34, 35, 0]])
MASK = (IDS > 0).long()
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


def calibrated(factory: NoisedInformation, model: nn.Module, *calls: Any, first: Any = INPUTS) -> Any:
    """Calibrate on the first input, run the others; return the context and the outputs."""
    outputs = []
    with factory.prepare(model) as hooked:
        with hooked.calibrating():
            hooked(**first)
        outputs = [hooked(**call) for call in calls]
    return hooked.hooking_context, outputs


def rows_of(ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    return Tokens().table(ids)[mask.bool()].detach()


# The noise.


def test_noise_has_the_standard_deviation_of_each_feature():
    model = Tokens()
    ids = torch.randint(1, 50, (20, 100), generator=torch.Generator().manual_seed(1))
    big = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    context, (out,) = calibrated(NoisedInformation("first", noise=0.5, **PLAIN), model, big, first=big)
    added = (out / 2 - model.table(ids)).detach()
    std = model.table(ids).flatten(0, 1).std(0, correction=0)
    # 2000 draws: a relative error of 1 / sqrt(4000) = 0.016.
    torch.testing.assert_close(added.flatten(0, 1).std(0), 0.5 * std, rtol=0.065, atol=0)
    assert (added.mean((0, 1)) / (0.5 * std)).abs().max() < 4 / 2000**0.5
    correlation = torch.corrcoef(added.flatten(0, 1).T)[0, 1]
    assert correlation.abs() < 4 / 2000**0.5
    torch.testing.assert_close(context.stds["first"], std.double(), rtol=1e-6, atol=0)


def test_only_tokens_that_count_get_noise():
    model = Tokens()
    plain = model(**INPUTS)
    for options, counts in (
        ({"skip_first": 0}, MASK.bool()),
        ({}, MASK.bool() & (torch.arange(4) > 0)),
        ({"tokens": "last", "skip_first": 0}, torch.arange(4) == MASK.sum(1, keepdim=True) - 1),
        ({"tokens": (0, 1), "skip_first": 0}, (torch.arange(4) < 2).expand(3, 4)),
    ):
        _, (out,) = calibrated(NoisedInformation("first", max_norm=None, **options), model, INPUTS)
        assert torch.equal((out != plain).all(-1), counts) and torch.equal((out != plain).any(-1), counts)


def test_pads_enter_neither_standard_deviations_nor_scores():
    model, expected = Tokens(), rows_of()
    model.table.weight.data[0] = torch.nan
    for ids, mask in ((IDS, MASK), (IDS.flip(1), MASK.flip(1))):
        given = {"input_ids": ids, "attention_mask": mask}
        context, _ = calibrated(NoisedInformation("first", noise=2.0, **PLAIN), model, given, first=given)
        torch.testing.assert_close(context.stds["first"], expected.double().std(0, correction=0))
        table = context.scores()
        bounds = kolchinsky_tracey_bounds(expected, 2.0 * expected.std(0, correction=0))
        assert [row.score for row in table.rows()] == pytest.approx([b.item() for b in bounds], abs=1e-5)
        assert {row.n for row in table.rows()} == {9}


def test_the_same_seed_gives_the_same_noise_pass_by_pass():
    model, calls = Tokens(), [INPUTS, INPUTS]
    _, first = calibrated(NoisedInformation("first|second", **PLAIN), model, *calls)
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    _, again = calibrated(NoisedInformation("first|second", **PLAIN), model, *calls)
    torch.random.set_rng_state(state)
    assert torch.equal(torch.stack(first), torch.stack(again))
    # Another pass, another seed, another module: other noise.
    assert not torch.equal(first[0], first[1])
    _, other = calibrated(NoisedInformation("first|second", seed=1, **PLAIN), model, *calls)
    assert not torch.equal(other[0], first[0])
    _, alone = calibrated(NoisedInformation("first", **PLAIN), model, *calls)
    _, last = calibrated(NoisedInformation("second", **PLAIN), model, *calls)
    plain = model(**INPUTS)
    # What a module gets does not depend on which others get some.
    torch.testing.assert_close(first[0], alone[0] + last[0] - plain, rtol=1e-5, atol=1e-4)
    for seed in (-3, 2**70):
        calibrated(NoisedInformation("first", seed=seed, **PLAIN), model, INPUTS)


def test_the_side_of_the_padding_does_not_matter():
    model = Tokens()
    left_mask = torch.stack([row.roll(int(4 - row.sum())) for row in MASK])
    left_ids = torch.stack([row.roll(int(4 - mask.sum())) for row, mask in zip(IDS, MASK, strict=True)])
    _, (right,) = calibrated(NoisedInformation("first", **PLAIN), model, INPUTS)
    left_call = {"input_ids": left_ids, "attention_mask": left_mask}
    _, (left,) = calibrated(NoisedInformation("first", **PLAIN), model, left_call)
    assert torch.equal(left[left_mask.bool()], right[MASK.bool()])


def test_no_noise_is_bit_identical_and_needs_no_calibration(hooks_of: Any):
    model = Tokens()
    model.table.weight.data[7] = torch.tensor([-0.0, torch.inf])
    plain = model(**INPUTS)
    with NoisedInformation("first|second", noise=0).prepare(model) as hooked:
        out = hooked(**INPUTS)
        with pytest.raises(RuntimeError, match="with noise=0 nothing is lost"):
            hooked.scores()
    assert torch.equal(out.view(torch.int32), plain.view(torch.int32)) and hooks_of(model) == 0


def test_the_model_and_the_random_state_are_as_before(hooks_of: Any):
    model = Tokens().train()
    weights, state, plain = copy.deepcopy(model.state_dict()), torch.random.get_rng_state(), model(**INPUTS)
    calibrated(NoisedInformation("first|second", **PLAIN), model, INPUTS)
    assert torch.equal(torch.random.get_rng_state(), state) and hooks_of(model) == 0 and model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**INPUTS), plain)
    with pytest.raises(KeyboardInterrupt), NoisedInformation("first").prepare(model):
        raise KeyboardInterrupt
    assert hooks_of(model) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay(dtype: torch.dtype):
    context, (out,) = calibrated(NoisedInformation("first", noise=0.1, **PLAIN), Tokens().to(dtype), INPUTS)
    assert out.dtype == dtype and bool((out != Tokens().to(dtype)(**INPUTS)).any())
    assert context.stds["first"].dtype == torch.float64


def test_models_without_tokens_get_noise_in_every_row():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))), torch.randn(30, 3)
    with NoisedInformation(r"\d", noise=0.3).prepare(model) as hooked:
        with hooked.calibrating():
            hooked(x)
        out = hooked(x)
        assert out.shape == (30, 2, 2) and bool((out != model[1](model[0](x) * 1.0)).all())
    assert hooked.scores().matrix("information_upper").shape == (2,)


# Scores.


def test_scores_are_the_bounds_of_what_arrived():
    model = Tokens()
    context, _ = calibrated(NoisedInformation("first|second", noise=1.5, **PLAIN), model, INPUTS)
    table = context.scores()
    assert table.layers() == ("first", "second") and table.estimators == ("information_lower", "information_upper")
    clean = rows_of()
    std = clean.std(0, correction=0)
    bounds = kolchinsky_tracey_bounds(clean, 1.5 * std)
    # The second module got what the first had made of it: subtract its own noise to see that.
    _, (first_only,) = calibrated(NoisedInformation("first", noise=1.5, **PLAIN), model, INPUTS)
    later = kolchinsky_tracey_bounds(first_only[MASK.bool()].detach(), 1.5 * 2 * std)
    for place, name in enumerate(table.estimators):
        expected = [bounds[place].item(), later[place].item()]
        assert table.matrix(name) == pytest.approx(expected, abs=1e-5)
    assert table.meta["noise"] == 1.5 and table.meta["seed"] == 0 and table.meta["calibration_rows"] == 9
    assert table.meta["log_rows"] == pytest.approx(math.log(9))
    assert ScoreTable.from_json(table.to_json()) == table


def test_batches_add_up_and_the_bank_is_bounded():
    model, g = Tokens(), torch.Generator().manual_seed(0)
    calls = [{"input_ids": ids} for ids in torch.randint(1, 50, (30, 2, 9), generator=g)]
    whole = {"input_ids": torch.cat([call["input_ids"] for call in calls])}
    one, _ = calibrated(NoisedInformation("first", noise=2.0, **PLAIN), model, whole, first=whole)
    factory = NoisedInformation("first", noise=2.0, stds=one.stds, **PLAIN)
    with factory.prepare(model) as hooked:
        for call in calls:
            hooked(**call)
        many = hooked.scores()
    for name in many.estimators:
        assert many.matrix(name) == pytest.approx(one.scores().matrix(name), abs=1e-6)
    small, _ = calibrated(NoisedInformation("first", noise=2.0, bank_size=16, **PLAIN), model, whole)
    assert small.scores().block("information_upper").n == 16 and small.scores().meta["rows"] == 540


def test_calibration_in_parts_is_calibration_in_one():
    model, g = Tokens(), torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (12, 9), generator=g)
    with NoisedInformation("first", **PLAIN).prepare(model) as hooked:
        context = hooked.hooking_context
        with context.calibrating():
            for part in ids.split(5):
                assert torch.equal(hooked(input_ids=part), model.table(part) * 2)
        parts = context.stds["first"]
        with context.calibrating():
            hooked(input_ids=ids)
        torch.testing.assert_close(parts, context.stds["first"], rtol=1e-6, atol=0)
        hooked(input_ids=ids)
        assert context.scorer.n == 108
        with context.calibrating():
            hooked(input_ids=ids)
        assert context.scorer.n == 0


def test_long_rows_are_left_out_of_both():
    model, ids = Tokens(), torch.arange(1, 41).reshape(4, 10)
    model.table.weight.data[20] = 1e4
    given = {"input_ids": ids}
    context, _ = calibrated(NoisedInformation("first", skip_first=0), model, given, first=given)
    clean = model.table.weight.data[1:41]
    kept = clean[torch.arange(40) != 19]
    keeps = clean.norm(dim=1) <= 4 * clean.norm(dim=1).median()
    torch.testing.assert_close(context.stds["first"], clean[keeps].double().std(0, correction=0))
    assert context.stds["first"].max() < 100 and context.scores().block("information_lower").n <= len(kept)


# With others.


def test_it_composes_and_acts_before_observers_in_the_order_of_entry():
    model = Tokens()
    stds = {"first": torch.ones(2)}
    noise, cache = NoisedInformation("first", stds=stds, **PLAIN), ActivationCaching("first")
    with CompositeHookingContextFactory(cache, noise).prepare(model) as hooked:
        out = hooked(**INPUTS)
        assert torch.equal(hooked.hooking_context.cache["first"] * 2, out)
    with SteeringVectors(["first"], lambda module_key, output: output * 0).prepare(model):
        with noise.prepare(model) as hooked:
            alone = hooked(**INPUTS)
    with noise.prepare(model):
        with SteeringVectors(["first"], lambda module_key, output: output * 0).prepare(model) as hooked:
            assert not hooked(**INPUTS).any()
    assert bool(alone[MASK.bool()].all()) and not alone[~MASK.bool()].any()


def test_another_thread_on_the_same_model_gets_no_noise():
    model, found = Tokens(), []
    with NoisedInformation("first", stds={"first": torch.ones(2)}, **PLAIN).prepare(model) as hooked:
        thread = threading.Thread(target=lambda: found.append(model(**INPUTS)))
        thread.start()
        thread.join(10)
        assert not torch.equal(hooked(**INPUTS), found[0])
        with hooked.hooking_context.disable_hooks():
            assert torch.equal(model(**INPUTS), found[0])
    assert torch.equal(found[0], Tokens()(**INPUTS))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda factory: pickle.loads(pickle.dumps(factory))])  # noqa: S301
def test_a_factory_is_a_value_and_a_copied_model_is_quiet(copied: Any):
    factory, model = NoisedInformation("first", stds={"first": torch.ones(2)}, **PLAIN), Tokens()
    with copied(factory).prepare(model) as hooked:
        out = hooked(**INPUTS)
        assert torch.equal(copy.deepcopy(model)(**INPUTS), Tokens()(**INPUTS))
    with factory.prepare(model) as hooked:
        assert torch.equal(hooked(**INPUTS), out)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad])
def test_modes(mode: Any):
    context, (plain,) = calibrated(NoisedInformation("first", **PLAIN), Tokens(), INPUTS)
    with mode():
        other, (out,) = calibrated(NoisedInformation("first", **PLAIN), Tokens(), INPUTS)
    assert torch.equal(out, plain)
    assert other.scores() == context.scores() and not other.stds["first"].is_inference()


def test_a_compiled_model():
    model = Tokens()
    compiled = torch.compile(model, backend="eager")
    compiled(**INPUTS)
    factory = NoisedInformation("first", stds={"first": torch.ones(2)}, **PLAIN)
    with factory.prepare(model) as hooked:
        expected = hooked(**INPUTS)
    with factory.prepare(compiled) as hooked:
        assert torch.equal(hooked(**INPUTS), expected)
    assert torch.equal(compiled(**INPUTS), model(**INPUTS))


# Gradients.


def test_gradients_pass_through():
    model = Tokens()
    _, (out,) = calibrated(NoisedInformation("first|second", **PLAIN), model, INPUTS)
    out.sum().backward()
    counts = torch.bincount(IDS.flatten(), minlength=50)
    torch.testing.assert_close(model.table.weight.grad, 2.0 * counts[:, None].expand(50, 2))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, times: int = 1) -> None:
        super().__init__()
        self.layer, self.reentrant, self.times = nn.Identity(), reentrant, times

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for _ in range(self.times):
            inputs_embeds = checkpoint(self._inner, inputs_embeds, use_reentrant=self.reentrant)
        return inputs_embeds

    def _inner(self, x: Tensor) -> Tensor:
        return self.layer(x) ** 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_same_noise(reentrant: bool):
    factory = NoisedInformation("layer", stds={"layer": torch.ones(2)}, **PLAIN)
    with factory.prepare(Checkpointed(reentrant)) as hooked:
        for mask in (torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 0, 0], [1, 1, 1]])):
            x = torch.randn(2, 3, 2, requires_grad=True)
            out = hooked(inputs_embeds=x, attention_mask=mask)
            out.sum().backward()
            torch.testing.assert_close((x.grad / 2) ** 2, out.detach())
            assert torch.equal((x.grad != 2 * x).all(-1), mask.bool())
    assert hooked.hooking_context.n_fired == {"layer": 2} and hooked.hooking_context.scorer.n == 9


def test_repeats_that_cannot_be_told_apart_are_refused():
    x, factory = torch.randn(2, 3, 2, requires_grad=True), NoisedInformation("layer", noise=0.1, **PLAIN)
    for times, passes, message in ((1, 2, "in one of 2 forward passes"), (2, 1, "ran 2 times in a pass")):
        with factory.prepare(Checkpointed(False, times)) as hooked:
            with hooked.calibrating(), torch.no_grad():
                hooked(inputs_embeds=x)
            losses = [hooked(inputs_embeds=x).sum() for _ in range(passes)]
            with pytest.raises(RuntimeError, match=message):
                sum(losses).backward()
    with factory.prepare(Checkpointed(False, 2)) as hooked:
        with hooked.calibrating():
            hooked(inputs_embeds=x).sum().backward()
    torch.testing.assert_close(x.grad, 4 * x.detach() ** 3)


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -1}, "from 0 on, such as 0.5; got -1"),
        ({"noise": math.inf}, "got inf"),
        ({"noise": True}, "got True"),
        ({"seed": 1.5}, "seed is an int, got 1.5"),
        ({"bank_size": 1}, "an int of at least 2\\), got 1"),
        ({"tokens": "mean"}, "no place to add noise to"),
        ({"tokens": "frist"}, "unknown token selection 'frist'"),
        ({"max_norm": 0.5}, "max_norm"),
        ({"stds": [1]}, "stds maps module names"),
        ({"stds": {"first": torch.zeros(2)}}, r"stds\['first'\] has shape \(2,\).*above 0"),
        ({"stds": {"first": torch.ones(2, 2)}}, r"shape \(2, 2\); it must be \(features,\)"),
    ],
)
def test_bad_arguments_are_refused(options: Any, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        NoisedInformation("first", **options)
    assert isinstance(caught.value, TdprobeError)


def test_a_call_before_calibration_says_what_to_do(hooks_of: Any):
    model = Tokens()
    with pytest.raises(RuntimeError, match=r"is not known yet.*calibrating\(\):"):
        with NoisedInformation("first").prepare(model) as hooked:
            hooked(**INPUTS)
    assert hooks_of(model) == 0
    with NoisedInformation("first", required=False).prepare(model) as hooked:
        with pytest.raises(RuntimeError, match="is not known yet"):
            _ = hooked.hooking_context.stds
    with pytest.raises(RuntimeError, match="cannot calibrate outside"):
        with hooked.calibrating():
            pass


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.3, "'first' gave the same row for every token"), (torch.nan, "'first' held NaN or infinite values")],
)
def test_layers_that_cannot_be_calibrated_are_named(value: float, message: str):
    model = Tokens()
    model.table.weight.data.fill_(value)
    with pytest.raises(RuntimeError, match=message):
        calibrated(NoisedInformation("first", **PLAIN), model)


def test_calibrations_that_are_none():
    one = {"input_ids": torch.tensor([[5, 6]])}
    with pytest.raises(RuntimeError, match="the calibration saw 1 rows of 'first'"):
        calibrated(NoisedInformation("first"), Tokens(), first=one)
    with NoisedInformation("first", required=False).prepare(Tokens()) as hooked:
        with pytest.raises(RuntimeError, match="the calibration saw 0 rows of 'first'"):
            with hooked.calibrating():
                pass
        with pytest.raises(RuntimeError, match="is being calibrated already"):
            with hooked.calibrating(), hooked.calibrating():
                pass
        # An error in the block is not covered up.
        with pytest.raises(KeyError, match="mine"), hooked.calibrating():
            raise KeyError("mine")


def test_other_refusals():
    with pytest.raises(ValueError, match="unknown layer among the standard deviations 'second'"):
        calibrated_with({"first": torch.ones(2)}, "first|second")
    with pytest.raises(ValueError, match="'first' has rows of width 2, its standard deviations 3"):
        calibrated_with({"first": torch.ones(3)}, "first")
    with pytest.raises(RuntimeError, match="no row has been scored yet"):
        calibrated(NoisedInformation("first"), Tokens())[0].scores()
    with pytest.raises(ValueError, match="matches no"):
        calibrated(NoisedInformation("third"), Tokens())

    class Integers(Tokens):
        def forward(self, input_ids: Tensor) -> Tensor:
            return self.first(input_ids[..., None])

    with pytest.raises(ValueError, match=r"a layer gave torch\.int64"):
        with NoisedInformation("first", stds={"first": torch.ones(1)}).prepare(Integers()) as hooked:
            hooked(IDS)


def calibrated_with(stds: dict[str, Tensor], pattern: str) -> None:
    with NoisedInformation(pattern, stds=stds).prepare(Tokens()) as hooked:
        hooked(**INPUTS)
