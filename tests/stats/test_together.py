"""Layers that go together, as they do on a GPU, give what each gives alone, as on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tdprobe.stats import Cross, Gram, Moments, State, Statistic, load_state, together

STATISTICS = [
    *(Moments(), Moments(normalize_rows=True), Gram(), Gram(unbiased=False)),
    *(Cross(), Cross(unbiased=True)),
]
# Several layers of a shape, not side by side, one that is alone, and one without columns.
WIDTHS = (3, 5, 3, 3, 1, 5, 0, 3)
ROOMY = 2**28


def rows(lead: tuple[int, ...] = (), kinds: tuple[torch.dtype, ...] = (torch.float64,), n: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lead))
    base = torch.randn(*lead, n, 1, generator=generator, dtype=torch.float64).cumsum(-2)
    layers = [base + torch.randn(*lead, n, d, generator=generator, dtype=torch.float64) for d in WIDTHS]
    return [x.to(kinds[place % len(kinds)]) for place, x in enumerate(layers)]


def fed(statistic: Statistic, layers: list[Tensor], sizes: tuple[int, ...] = (4, 0, 16, 20)) -> State:
    ids = torch.arange(layers[0].shape[-2])
    state = statistic.init(layers, ids)
    for part in zip(ids.split(sizes), *(x.split(sizes, -2) for x in layers), strict=True):
        state = statistic.update(state, part[1:], part[0])
    return state


def same(found: State, expected: State, tolerance: float = 1e-12) -> None:
    numbers = (state.to_tensordict().flatten_keys().items() for state in (found, expected))
    for (key, x), (other, y) in zip(*numbers, strict=True):
        assert key == other
        scale = y.nan_to_num().double().abs().max() if y.numel() else 0
        torch.testing.assert_close(x, y, rtol=tolerance, atol=float(tolerance * scale), equal_nan=True)


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Say how many bytes to spend on copies."""
    return lambda nbytes: monkeypatch.setattr(together, "room", lambda device: nbytes)


@pytest.mark.parametrize("statistic", STATISTICS, ids=str)
class TestStatistics:
    """One path, for layers alone and together."""

    @pytest.mark.parametrize("lead", [(), (2,), (2, 1)], ids=str)
    # All layers of a shape together, and few at a time.
    @pytest.mark.parametrize("nbytes", [ROOMY, 3000])
    def test_layers_together_give_what_each_gives_alone(
        self, statistic: Statistic, lead: tuple[int, ...], nbytes: int, spend: Callable[[int], None]
    ) -> None:
        layers = rows(lead)
        alone = fed(statistic, layers)
        spend(nbytes)
        same(fed(statistic, layers), alone)

    @pytest.mark.parametrize("odd", [torch.nan, torch.inf])
    def test_one_layer_that_is_not_finite_leaves_the_others_alone(
        self, statistic: Statistic, odd: float, spend: Callable[[int], None]
    ) -> None:
        layers = rows()
        layers[2][7, 1] = odd
        alone = fed(statistic, layers)
        spend(ROOMY)
        same(fed(statistic, layers), alone)

    def test_rows_of_several_dtypes(self, statistic: Statistic, spend: Callable[[int], None]) -> None:
        layers = rows(kinds=(torch.float64, torch.bfloat16, torch.float32))
        alone = fed(statistic, layers)
        spend(ROOMY)
        same(fed(statistic, layers), alone)

    def test_merges(self, statistic: Statistic, spend: Callable[[int], None]) -> None:
        layers = rows((2,))
        parts = [[x[:, :25] for x in layers], [x[:, 25:] for x in layers]]
        first, second = (fed(statistic, part, (len(part[0][0]),)) for part in parts)
        alone = first.merge(second)
        spend(ROOMY)
        same(first.merge(second), alone)

    def test_a_state_is_a_value_that_fits_into_a_file(
        self, statistic: Statistic, spend: Callable[[int], None], tmp_path: object
    ) -> None:
        spend(ROOMY)
        layers, ids = rows(), torch.arange(40)
        state = fed(statistic, layers)
        before = state.clone()
        statistic.update(state, layers, ids)
        same(state, before, 0)
        state.save(f"{tmp_path}/state", statistic=statistic)
        same(load_state(f"{tmp_path}/state", statistic=statistic), before, 0)


def test_layers_of_one_shape_and_dtype_go_together(spend: Callable[[int], None]) -> None:
    layers = [torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3), torch.ones(2, 3).double(), torch.ones(2, 3)]
    assert together.together(layers, Tensor.numel) == [[0], [1], [2], [3], [4]]
    spend(1000)
    assert together.together(layers, Tensor.numel) == [[0, 2, 4], [1], [3]]
    spend(13)
    assert together.together(layers, Tensor.numel) == [[0, 2], [1], [3], [4]]
    spend(1)
    assert together.together(layers, Tensor.numel) == [[0], [1], [2], [3], [4]]


def test_a_layer_that_is_alone_is_not_copied() -> None:
    layers = [torch.ones(2, 3), torch.ones(2, 3)]
    assert together.stacked(layers, [1]) is layers[1] and together.apart(layers[1], [1])[0] is layers[1]


def test_a_gpu_has_room_and_the_cpu_has_none() -> None:
    assert together.room(torch.device("cpu")) == 0 and together.room(torch.device("cuda")) == together.ROOM
