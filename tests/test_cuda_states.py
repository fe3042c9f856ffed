"""On a GPU, states, tables and functions give what they give on the CPU for the same rows, and stay there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from estimator_rows import ROWS
from tdprobe import registry
from tdprobe.latent import InformationImbalanceEstimator
from tdprobe.latent import disentanglement as parts
from tdprobe.latent import information as entropies
from tdprobe.latent.representation_similarity.cka import cka_matrix
from tdprobe.stats import Cross, Gram, Kernel, Kernels, Moments, Neighbors, Reservoir, Statistic, load_state
from tdprobe.stats.gram import BUDGET
from tdprobe.stats.jackknife import jackknife_se
from tdprobe.stats.pair_sums import PairSums
from tdprobe.stream.batch import Batch
from test_estimator_contract import batch_of, rows, streaming, targets

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = "cuda"
# Estimators of this package and of others; targets are known of the former.
NAMES = [name for name in registry.names() if name in ROWS]
TWENTIES = [slice(start, start + 20) for start in (0, 20, 40)]


@pytest.fixture
def tf32() -> Iterator[None]:
    """Let products of float32 be rounded to ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def on_cuda(batch: Batch) -> Batch:
    """Move rows and targets; ids stay on the CPU, as in a stream."""
    moved = ({key: x.to(CUDA) for key, x in part.items()} for part in (batch.rows, batch.targets))
    layers, known = moved
    return Batch(layers, batch.ids, known)


def fed(estimator: Any, batch: Batch, cuts: list[slice] = TWENTIES) -> Any:
    state = estimator.init(batch)
    for cut in cuts:
        state = estimator.update(state, batch.select(cut))
    return state


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    assert found.device.type == CUDA
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
class TestRegistry:
    """The streaming form of every name."""

    @pytest.fixture
    def both(self, name: str) -> tuple[Any, Batch, Batch]:
        estimator = streaming(name)
        batch = batch_of(estimator, rows(), targets(name) if estimator.target_keys else None)
        return estimator, batch, on_cuda(batch)

    @pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
    def test_updates_give_what_they_give_on_the_cpu(self, name: str, kind: torch.dtype) -> None:
        estimator = streaming(name)
        batch = batch_of(estimator, rows(kind=kind), targets(name) if estimator.target_keys else None)
        expected = estimator.score(fed(estimator, batch))
        found = estimator.score(fed(estimator, on_cuda(batch)))
        assert not expected["score"].isnan().all() and set(found.keys()) == set(expected.keys())
        tolerance = 1e-8 if kind == torch.float64 else 1e-4
        same(found["score"], expected["score"], tolerance)

    def test_merges(self, name: str, both: Any) -> None:
        estimator, _, batch = both
        first, second = (fed(estimator, batch, [cut]) for cut in (slice(0, 40), slice(40, 60)))
        single = estimator.score(fed(estimator, batch, [slice(0, 40), slice(40, 60)]))["score"]
        if not ROWS[name].ordered:
            same(estimator.score(first.merge(second))["score"], single.cpu())

    def test_saved_half_way_and_moved_back(self, name: str, both: Any, tmp_path: Path) -> None:
        estimator, batch, moved = both
        fed(estimator, moved, TWENTIES[:2]).save(tmp_path / "half", statistic=estimator.statistic())
        half = load_state(tmp_path / "half", estimator.statistic()).to(CUDA)
        found = estimator.update(half, moved.select(TWENTIES[2]))
        expected = estimator.score(fed(estimator, batch))["score"]
        same(estimator.score(found)["score"], expected)
        if not ROWS[name].ordered:
            late = fed(estimator, moved, TWENTIES[2:])
            same(estimator.score(half.merge(late))["score"], expected)
            same(estimator.score(late.merge(half))["score"], expected)

    def test_a_state_on_the_cpu_again(self, name: str, both: Any) -> None:
        estimator, batch, moved = both
        state = fed(estimator, moved, TWENTIES[:2]).cpu()
        assert {x.device.type for x in state.values(include_nested=True, leaves_only=True)} <= {"cpu"}
        state = estimator.update(state, batch.select(TWENTIES[2]))
        found, expected = (estimator.score(part)["score"] for part in (state, fed(estimator, batch)))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8, equal_nan=True)


def layers(kind: torch.dtype, n: int = 700, d: int = 90) -> list[Tensor]:
    """Return rows in general position, rows on a grid, many of them repeated, and rows around a far point."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(n, 4, generator=g, dtype=torch.float64)
    free = common @ torch.randn(4, d, generator=g, dtype=torch.float64)
    free += 0.1 * torch.randn(n, d, generator=g, dtype=torch.float64)
    grid = torch.randint(0, 3, (n, 6), generator=g).double() + (common[:, :1] > 0)
    grid[n // 2 :] = grid[: n - n // 2]
    return [x.to(kind) for x in (free, grid, free[:, :30] + 500)]


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["highest", "high"])
class TestTables:
    @pytest.mark.parametrize("p", [2.0, 1.0, torch.inf])
    def test_neighbours(self, request: Any, kind: torch.dtype, precision: str, p: float) -> None:
        expected = Neighbors((1, 2, 5), imbalance=True, p=p, places=5).of_rows(layers(kind))
        request.getfixturevalue("tf32") if precision == "high" else None
        found = Neighbors((1, 2, 5), imbalance=True, p=p, places=5).of_rows([x.to(CUDA) for x in layers(kind)])
        same(found.distances, expected.distances, 1e-10)
        same(found.imbalance, expected.imbalance, 1e-9)
        same(found.first, expected.first, 0)
        if kind != torch.bfloat16:  # rows that are as near, as many are there, may be listed in any order
            same(found.places[0], expected.places[0], 0)

    def test_measures_of_one_bank(self, request: Any, kind: torch.dtype, precision: str) -> None:
        names = ["mutual_knn", "jaccard", "rank_similarity", "second_order_cosine", "cknna", "rsa", "corr_int", "twonn"]
        batch = Batch({str(i): x for i, x in enumerate(layers(kind))}, torch.arange(700))
        banks = [Reservoir().update(Reservoir().init(list(b.rows.values()), b.ids), list(b.rows.values()), b.ids)
                 for b in (batch, on_cuda(batch))]  # fmt: skip
        expected = [registry.streaming(name).score(banks[0])["score"] for name in names]
        request.getfixturevalue("tf32") if precision == "high" else None
        for name, wanted in zip(names, expected, strict=True):
            same(registry.streaming(name).score(banks[1])["score"], wanted, 1e-5)

    def test_sums(self, request: Any, kind: torch.dtype, precision: str) -> None:
        known = layers(kind)
        exact = [x.double() for x in known]
        kernels = (Kernel("rbf"), Kernel("distance"), Kernel("square", "standard", ranks=True))

        def scored(given: list[Tensor]) -> list[Tensor]:
            table = Kernels(kernels).of_rows(given)
            found = [sums.alignment(True) for sums in table.sums.values()]
            found += [PairSums.correlation(sums) for sums in table.sums.values()]
            for statistic in (Gram(), Cross(), Cross(unbiased=True)):
                ids = torch.arange(len(given[0]))
                found.append(statistic.update(statistic.init(given, ids), given, ids).hsic.log())
            return [*found, cka_matrix(given)]

        expected = scored(exact)
        request.getfixturevalue("tf32") if precision == "high" else None
        for found, wanted in zip(scored([x.to(CUDA) for x in known]), expected, strict=True):
            same(found.double(), wanted, 1e-4)


def test_autocast_of_the_model_is_not_that_of_statistics() -> None:
    known = [x.to(CUDA) for x in layers(torch.float32)]
    ids = torch.arange(len(known[0]))

    def scored() -> list[Tensor]:
        bank = Reservoir().update(Reservoir().init(known, ids), known, ids)
        names = ("mutual_knn", "information_imbalance", "matrix_joint_entropy", "cknna")
        return [registry.streaming(name).score(bank)["score"] for name in names]

    plain = scored()
    with torch.autocast(CUDA, dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(scored(), plain, strict=True))


@pytest.mark.parametrize("statistic", [Moments(), Cross(), Cross(unbiased=True), Gram(), Reservoir(2048)], ids=repr)
def test_memory_is_bounded_by_the_state_and_a_batch(statistic: Statistic) -> None:
    widths, n = [512] * 6, 512
    size = statistic.nbytes(widths)
    state = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for number in range(40):
        known = [torch.randn(n, d, device=CUDA) for d in widths]
        ids = torch.arange(number * n, (number + 1) * n)
        state = statistic.update(statistic.init(known, ids) if state is None else state, known, ids)
    peak = torch.cuda.max_memory_allocated() - before
    # The old state, the new one and what is added; float64 rows twice; tiles of Grams, and what cuBLAS takes once.
    assert peak <= 3 * size + 5 * 8 * n * sum(widths) + 3 * BUDGET + 2**26


def test_group_sizes_may_be_on_the_cpu() -> None:
    whole, without = torch.rand(3, 3, dtype=torch.float64), torch.rand(8, 3, 3, dtype=torch.float64)
    sizes = torch.arange(8.0)
    same(jackknife_se(whole.to(CUDA), without.to(CUDA), sizes), jackknife_se(whole, without, sizes))


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(300, 2, generator=g, dtype=torch.float64)
    return torch.cat([a + 0.3 * torch.randn(300, 2, generator=g, dtype=torch.float64), a.square()], 1), a


def clouds() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    clean, noisy, means = torch.randn(3, 6, 5, 8, generator=g)
    return clean, noisy, means, 0.5 + torch.rand(6, 5, 8, generator=g), torch.rand(6, 5, generator=g) > 0.2


def sub_batch(*given: Tensor, **options: Any) -> Tensor:
    clean, noisy, means, stds, mask = given
    return entropies.mutual_information_sub_batch(means, stds, mask, clean, noisy, **options)


def imbalance(x: Tensor, y: Tensor) -> Tensor:
    td = InformationImbalanceEstimator()(TensorDict({"data_a": x, "data_b": y}))
    return torch.stack([td["information_imbalance_a_to_b"], td["information_imbalance_b_to_a"]])


@pytest.mark.parametrize(
    "function",
    [parts.mig, parts.dmig, parts.dlig, parts.xmig, parts.modularity, parts.sap, parts.mutual_information, imbalance,
     lambda z, a: parts.dci(z, a)["importance"], lambda z, a: parts.mig(z, (a > 0).long(), discrete=True),
     lambda z, a: parts.smoothness(z.T, a.T[[0, 1, 0, 1]]), lambda z, a: parts.monotonicity(z.T, a.T[[0, 1, 0, 1]]),
     lambda z, a: entropies.trajectory_curvature(z)[0]],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_functions_of_latents(function: Callable[..., Tensor]) -> None:
    z, a = pair()
    same(function(z.to(CUDA), a.to(CUDA)), function(z, a), 1e-6)


@pytest.mark.parametrize("method", ["loop", "matmul"])
@pytest.mark.parametrize("estimator", ["pairwise", "mixture"])
@pytest.mark.parametrize("function", [entropies.gaussian_mixture_entropy, sub_batch])
def test_entropies_and_their_gradients(function: Any, estimator: str, method: str, tf32: None) -> None:
    found = []
    for device in ("cpu", CUDA):
        *inputs, mask = (x.to(device) for x in clouds())
        for x in inputs:
            x.requires_grad_()
        value = function(*inputs, mask, estimator=estimator, method=method)
        value.backward()
        found.append([value.detach(), *(x.grad for x in inputs if x.grad is not None)])
    for expected, got in zip(*found, strict=True):
        same(got, expected, 1e-4)
