"""LayerScoring against a float64 reference on rows that were collected and selected by other means."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdprobe.contexts import CompositeHookingContextFactory
from tdprobe.errors import ConfigError, StateError
from tdprobe.latent import ActivationCaching, CkaEstimator, LayerScoring

LAYERS = r"model\.layers\.(\d$|1\.mlp\.up_proj)"
BATCH, WIDTH = 4, 12

Rows = dict[str, np.ndarray]


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC_1 as Song et al. 2012 print it: raw Grams, diagonals removed."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    sums = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * k.sum(0) @ m.sum(1)
    return sums / (n * (n - 3))


def minibatch_cka(rows: Rows, sizes: Sequence[int]) -> np.ndarray:
    """Average HSIC_1 over groups of rows, each with the weight of its rows, then take the ratio."""
    assert sum(sizes) == len(next(iter(rows.values())))
    cuts = np.cumsum(sizes)[:-1]
    parts = [np.split(x.astype(np.float64), cuts) for x in rows.values()]
    sums = np.array([[sum(len(x) * hsic(x, y) for x, y in zip(a, b, strict=True)) for b in parts] for a in parts])
    return sums / np.sqrt(np.outer(np.diag(sums), np.diag(sums)))


def biased_cka(rows: Rows) -> np.ndarray:
    centred = [x - x.mean(0) for x in (x.astype(np.float64) for x in rows.values())]
    cross = np.array([[((a.T @ b) ** 2).sum() for b in centred] for a in centred])
    return cross / np.sqrt(np.outer(np.diag(cross), np.diag(cross)))


def padded(side: str, seed: int = 0) -> tuple[dict[str, Tensor], list[int]]:
    """Make a batch of 4 texts of 4 to 12 tokens, and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [WIDTH, *torch.randint(4, WIDTH, (BATCH - 1,), generator=generator).tolist()]
    mask = torch.tensor([[1] * n + [0] * (WIDTH - n) for n in lengths])
    mask = mask if side == "right" else mask.flip(1)
    ids = torch.randint(1, 128, (BATCH, WIDTH), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}, lengths


def cached(model: nn.Module, batches: Sequence[dict[str, Tensor]], pattern: str = LAYERS) -> list[dict[str, Tensor]]:
    found = []
    for batch in batches:
        with torch.no_grad(), ActivationCaching(pattern).prepare(model) as hooked:
            hooked(**batch)
        cache = dict(hooked.hooking_context.cache.items())
        # Tables list layers as the model defines them.
        found.append({name: cache[name].clone() for name, _ in model.named_modules() if name in cache})
    return found


def selected(
    model: nn.Module,
    batches: Sequence[tuple[dict[str, Tensor], list[int]]],
    positions: Callable[[int], Sequence[int]],
    mean: bool = False,
    pattern: str = LAYERS,
) -> Rows:
    """Take ``positions(length)`` of the real tokens of each text, text by text."""
    rows: dict[str, list[np.ndarray]] = {}
    for (batch, lengths), values in zip(batches, cached(model, [b for b, _ in batches], pattern), strict=True):
        for row, length in enumerate(lengths):
            real = batch["attention_mask"][row].nonzero()[:, 0].tolist()
            take = [real[position] for position in positions(length)]
            for name, value in values.items():
                chosen = value[row, take].double().numpy()
                rows.setdefault(name, []).append(chosen.mean(0, keepdims=True) if mean else chosen)
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def groups(n: int, portion: int) -> list[int]:
    """Full portions as long as 8 rows or more stay for the last one."""
    full = max(0, (n - 8) // portion)
    return [portion] * full + [n - portion * full]


def score(model: nn.Module, batches: Sequence[Any], pattern: str = LAYERS, **options: Any) -> Any:
    with torch.no_grad(), LayerScoring(pattern, **{"max_norm": None, **options}).prepare(model) as hooked:
        for batch in batches:
            hooked(**batch) if isinstance(batch, dict) else hooked(batch)
    return hooked.hooking_context.scores()


class Branches(nn.Module):
    """Three layers side by side: what one does, the others do not see."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(6, 3)
        self.skip_b = False

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.a(x), x[:, :1] if self.skip_b else self.b(x), self.c(x)]
        return torch.cat(outputs, 1)


def inputs(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def branch_rows(model: Branches, x: Tensor) -> Rows:
    with torch.no_grad():
        return {name: getattr(model, name)(x).numpy() for name in "abc"}


EVERY_THIRD = torch.zeros(BATCH, WIDTH, dtype=torch.bool)
EVERY_THIRD[:, ::3] = True


def odd_positions(call: Any) -> Tensor:
    return call.positions % 2 == 1


CLAUSES: list[tuple[Any, int, Callable[[int], Sequence[int]]]] = [
    ("all", 0, lambda n: range(n)),
    ("all", 1, lambda n: range(1, n)),
    ("all", 3, lambda n: range(3, n)),
    ("last", 1, lambda n: [n - 1]),
    ("mean", 0, lambda n: range(n)),
    ("mean", 2, lambda n: range(2, n)),
    ("1:3", 0, lambda n: range(1, 3)),
    ("-3:", 0, lambda n: range(n - 3, n)),
    (slice(None, None, 2), 1, lambda n: range(2, n, 2)),
    (2, 0, lambda n: [2]),
    ([0, -1], 0, lambda n: [0, n - 1]),
    ([0, -1], 1, lambda n: [n - 1]),
    (odd_positions, 0, lambda n: range(1, n, 2)),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("tokens", "skip_first", "positions"), CLAUSES, ids=lambda value: str(value)[:12])
def test_scores_are_minibatch_cka_of_the_selected_rows(
    tiny_llama: nn.Module, side: str, tokens: Any, skip_first: int, positions: Callable[[int], Sequence[int]]
) -> None:
    batches = [padded(side, seed) for seed in range(6)]
    table = score(tiny_llama, [b for b, _ in batches], tokens=tokens, skip_first=skip_first, rows_per_update=10)
    rows = selected(tiny_llama, batches, positions, mean=tokens == "mean")
    n = len(rows["model.layers.0"])
    assert table.layers() == tuple(rows) and len(rows) == 5
    assert rows["model.layers.1.mlp.up_proj"].shape[1] == 64
    np.testing.assert_allclose(table.matrix(), minibatch_cka(rows, groups(n, 10)), atol=2e-4)
    assert {row.n for row in table} == {n} == {table.meta["rows"]}
    assert table.meta["outliers"] == 0 and table.meta["skip_first"] == skip_first


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_chooses_columns_of_the_batch_and_never_pads(tiny_llama: nn.Module, side: str) -> None:
    batches = [padded(side, seed)[0] for seed in range(3)]
    table = score(tiny_llama, batches, tokens=EVERY_THIRD, skip_first=0)
    rows: dict[str, list[Tensor]] = {}
    for batch, values in zip(batches, cached(tiny_llama, batches), strict=True):
        for name, value in values.items():
            rows.setdefault(name, []).append(value[EVERY_THIRD & batch["attention_mask"].bool()])
    whole = {name: torch.cat(parts).numpy() for name, parts in rows.items()}
    np.testing.assert_allclose(table.matrix(), minibatch_cka(whole, [table.meta["rows"]]), atol=1e-4)
    assert table.meta["tokens"] == "mask (4, 12)"


@pytest.mark.parametrize("n", [9, 17, 18, 27, 28, 40])
def test_every_row_counts_once_and_no_update_is_small(n: int) -> None:
    model, x = Branches(), inputs(n)
    table = score(model, x.split(3), "", rows_per_update=10)
    rows = branch_rows(model, x)
    np.testing.assert_allclose(table.matrix(), minibatch_cka(rows, groups(n, 10)), atol=1e-4)
    if n > 17:
        # Rows compared across groups would give another value: the tolerance tells the two apart.
        assert np.abs(minibatch_cka(rows, groups(n, 10)) - minibatch_cka(rows, [n])).max() > 1e-3
    assert next(iter(table)).n == n


def test_single_texts_with_one_row_each_gather_into_updates(tiny_llama: nn.Module) -> None:
    texts = [torch.randint(1, 128, (1, 5 + i % 3), generator=torch.Generator().manual_seed(i)) for i in range(21)]
    table = score(tiny_llama, [{"input_ids": ids} for ids in texts], tokens="last", rows_per_update=12)
    values = cached(tiny_llama, [{"input_ids": ids} for ids in texts])
    rows = {name: np.concatenate([v[name][:, -1].numpy() for v in values]) for name in values[0]}
    np.testing.assert_allclose(table.matrix(), minibatch_cka(rows, [12, 9]), atol=1e-4)


def test_the_hooked_module_gives_the_scores_in_the_block_and_after_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    composite = CompositeHookingContextFactory(ActivationCaching("0"), LayerScoring(r"\d"))
    for factory in (LayerScoring(r"\d"), composite):
        with factory.prepare(model) as hooked:
            hooked(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
            inside = hooked.scores()
        np.testing.assert_array_equal(hooked.scores().matrix(), inside.matrix())
        np.testing.assert_array_equal(hooked.hooking_context.scores().matrix(), inside.matrix())


def test_scores_in_between_do_not_disturb_the_stream() -> None:
    model, x = Branches(), inputs(60)
    with torch.no_grad(), LayerScoring("", rows_per_update=16, max_norm=None).prepare(model) as hooked:
        context = hooked.hooking_context
        for count, part in enumerate(x.split(5), 1):
            hooked(part)
            assert context.n_rows == 5 * count
            now = context.scores()
            rows = branch_rows(model, x[: 5 * count])
            np.testing.assert_allclose(now.matrix(), minibatch_cka(rows, groups(5 * count, 16)), atol=1e-4)
    assert context.scores().matrix().tolist() == now.matrix().tolist()
    with torch.no_grad(), context as hooked:
        hooked(inputs(4, seed=9))
    assert context.n_rows == 64
    context.reset()
    with pytest.raises(StateError, match="no row has been scored yet"):
        context.scores()


@pytest.mark.parametrize("order", [1, -1])
def test_exact_and_streaming_cka_side_by_side(order: int) -> None:
    model, x = Branches(), inputs(50)
    estimators = [CkaEstimator(unbiased=False), "cka"][::order]
    table = score(model, x.split(10), "", estimators=estimators, rows_per_update=20)
    rows = branch_rows(model, x)
    assert set(table.estimators) == {"cka", "cka-2"}
    np.testing.assert_allclose(table.matrix("cka-2"), biased_cka(rows), atol=1e-5)
    np.testing.assert_allclose(table.matrix("cka"), minibatch_cka(rows, [20, 20, 10]), atol=1e-4)
    assert "minibatch=True" in table.meta["estimators"]["cka"]
    assert "unbiased=False" in table.meta["estimators"]["cka-2"]


def test_early_stop_gives_the_same_scores_and_spares_the_rest(tiny_llama: nn.Module) -> None:
    batches, ran = [padded("left", seed)[0] for seed in range(3)], []
    full = score(tiny_llama, batches, r"model\.layers\.[012]$")
    handle = tiny_llama.model.layers[3].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        short = score(tiny_llama, batches, r"model\.layers\.[012]$", early_stop=True)
    finally:
        handle.remove()
    assert not ran and short.matrix().tolist() == full.matrix().tolist() and short.meta == full.meta


@pytest.mark.parametrize("how", ["bfloat16 model", "autocast", "inference_mode"])
def test_statistics_are_exact_whatever_the_forward_pass_runs_in(tiny_llama: nn.Module, how: str) -> None:
    model = copy.deepcopy(tiny_llama).to(torch.bfloat16) if how == "bfloat16 model" else tiny_llama
    context: Any = torch.no_grad()
    if how == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    elif how == "inference_mode":
        context = torch.inference_mode()
    batches = [padded("right", seed) for seed in range(4)]
    with context:
        with LayerScoring(LAYERS, [CkaEstimator(), "cka"], max_norm=50).prepare(model) as hooked:
            for batch, _ in batches:
                hooked(**batch)
            inside = hooked.hooking_context.scores()
        rows = selected(model, batches, lambda n: range(1, n))
    table = hooked.hooking_context.scores()
    assert table == inside
    n = table.meta["rows"]
    # Products of bfloat16 would be wrong in the third digit.
    np.testing.assert_allclose(table.matrix("cka"), minibatch_cka(rows, [n]), atol=1e-4)
    np.testing.assert_allclose(table.matrix("cka-2"), biased_cka(rows), atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_inside_the_block_is_bit_for_bit_the_same(tiny_llama: nn.Module, checkpointing: bool) -> None:
    def train(scoring: bool) -> tuple[dict[str, Tensor], Tensor, Any]:
        model = copy.deepcopy(tiny_llama).train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        if checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        context = LayerScoring(LAYERS, skip_first=0, max_norm=None).prepare(model)
        torch.manual_seed(1)
        if scoring:
            context.__enter__()
        for seed in range(3):
            batch, _ = padded("right", seed)
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if scoring:
            context.__exit__(None, None, None)
        return model.state_dict(), torch.random.get_rng_state(), context

    with torch.random.fork_rng(devices=[]):
        (plain, rng, _), (scored, rng_scored, context) = train(False), train(True)
    assert all(torch.equal(plain[name], scored[name]) for name in plain)
    assert torch.equal(rng, rng_scored)
    assert not torch.equal(plain["lm_head.weight"], tiny_llama.lm_head.weight)
    # Recomputation in the backward pass is not a second look at the same rows.
    assert context.n_rows == sum(sum(padded("right", seed)[1]) for seed in range(3))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_keeps_finished_batches_and_leaves_no_hook(hooks_of: Any, error: type[BaseException]) -> None:
    model, x = Branches(), inputs(40)
    before, count = hooks_of(model), []

    def strike(*_: Any) -> None:
        count.append(1)
        if len(count) == 3:
            raise error("in the middle of a batch")

    handle = model.c.register_forward_pre_hook(strike)
    with pytest.raises(error, match="in the middle"), LayerScoring("", max_norm=None).prepare(model) as hooked:
        for part in x.split(10):
            hooked(part)
    handle.remove()
    assert hooks_of(model) == before
    table = hooked.hooking_context.scores()
    np.testing.assert_allclose(table.matrix(), minibatch_cka(branch_rows(model, x[:20]), [20]), atol=1e-4)
    assert hooked.hooking_context.n_rows == 20


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("estimator", ["cka", CkaEstimator()], ids=["cka", "exact"])
def test_nan_shows_in_its_layer_and_nowhere_else(value: float, estimator: Any) -> None:
    model, x = Branches(), inputs(60)
    with torch.no_grad(), LayerScoring("", [estimator], rows_per_update=16).prepare(model) as hooked:
        bias = float(model.b.bias[2])
        for number, part in enumerate(x.split(10)):
            model.b.bias[2] = value if number == 3 else bias
            hooked(part)
    got = hooked.hooking_context.scores().matrix()
    assert np.isnan(got[1]).all() and np.isnan(got[:, 1]).all()
    clean = score(model, x.split(10), "a|c", estimators=[estimator], rows_per_update=16, max_norm=10).matrix()
    assert got[::2, ::2].tolist() == clean.tolist()


def test_another_thread_on_the_same_model_adds_nothing() -> None:
    model, x = Branches(), inputs(30)
    with torch.no_grad(), LayerScoring("", max_norm=None).prepare(model) as hooked:
        hooked(x[:20])
        other = threading.Thread(target=model, args=(x[20:],))
        other.start()
        other.join()
        assert hooked.hooking_context.n_rows == 20
        model(x[20:])
        assert hooked.hooking_context.n_rows == 30


@pytest.mark.parametrize("tokens", ["generated", "all", "last", "prompt"])
def test_generate_scores_prompts_and_steps(tiny_llama: nn.Module, tokens: str) -> None:
    batch, lengths = padded("left", 3)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with LayerScoring(LAYERS, tokens=tokens, skip_first=0, max_norm=None).prepare(tiny_llama) as hooked:
        sequences = hooked.generate(**batch, **options)
    # The last new token is never an input.
    whole = {"input_ids": sequences[:, :-1], "attention_mask": torch.ones(BATCH, WIDTH + 4, dtype=torch.long)}
    whole["attention_mask"][:, :WIDTH] = batch["attention_mask"]
    positions = {
        "generated": lambda n: range(n - 4, n),
        "all": lambda n: range(n),
        "last": lambda n: [n - 5],
        "prompt": lambda n: range(n - 4),
    }[tokens]
    rows = selected(tiny_llama, [(whole, [n + 4 for n in lengths])], positions)
    table = hooked.hooking_context.scores()
    n = {"generated": 16, "all": sum(lengths) + 16, "last": 4, "prompt": sum(lengths)}[tokens]
    assert {row.n for row in table} == {n}
    np.testing.assert_allclose(table.matrix(), minibatch_cka(rows, [n]), atol=2e-3)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=128, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
        return BertModel(config).eval()


@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_token_layers_meet_a_pooler(bert: nn.Module, tokens: str) -> None:
    batches = [padded("right", seed) for seed in range(4)]
    pattern = r"encoder\.layer\.\d$|pooler$"
    table = score(bert, [b for b, _ in batches], pattern, tokens=tokens)
    positions = (lambda n: [n - 1]) if tokens == "last" else (lambda n: range(1, n))
    rows = selected(bert, batches, positions, tokens == "mean", r"encoder\.layer\.\d$")
    rows["pooler"] = np.concatenate([v["pooler"].numpy() for v in cached(bert, [b for b, _ in batches], "pooler$")])
    np.testing.assert_allclose(table.matrix(), minibatch_cka(rows, [16]), atol=1e-4)


def test_a_pooler_has_no_row_per_token(bert: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"layer 'pooler' gives a value of shape \(4, 16\).*tokens='last'"):
        score(bert, [padded("right")[0]], r"encoder\.layer\.\d$|pooler$")


@pytest.mark.parametrize("pattern", [r"encoder\.layer\.\d$|pooler$", r"encoder\.layer\.\d$"])
def test_texts_that_are_too_short_bring_no_row_and_end_nothing(bert: nn.Module, pattern: str) -> None:
    texts = [torch.randint(1, 128, (1, 1 + i % 3), generator=torch.Generator().manual_seed(i)) for i in range(30)]
    table = score(bert, [{"input_ids": ids} for ids in texts], pattern, tokens="last")
    long = [{"input_ids": ids} for ids in texts if ids.shape[1] > 1]
    assert {row.n for row in table} == {20} == {len(long)}
    assert table.blocks == score(bert, long, pattern, tokens="last").blocks
    batch = {
        "input_ids": torch.ones(3, 3, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
    }
    with torch.no_grad(), LayerScoring(pattern, tokens="last").prepare(bert) as hooked:
        hooked(**batch)
        assert hooked.hooking_context.n_rows == 2
        hooked.hooking_context.reset()
        hooked(input_ids=texts[0])
    with pytest.raises(
        StateError, match="no row has been scored yet.*tokens that tokens='last' and skip_first=1 leave"
    ):
        hooked.hooking_context.scores()


class Looped(nn.Module):
    """One block that runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = torch.tanh(self.block(x))
        return x


@pytest.mark.parametrize("early_stop", [False, True])
def test_of_a_layer_that_runs_again_the_last_run_counts_unless_stopped(early_stop: bool) -> None:
    model, x = Looped(), inputs(40)
    with torch.no_grad():
        first = model.first(x)
        runs = [model.block(first)]
        for _ in range(2):
            runs.append(model.block(torch.tanh(runs[-1])))
    rows = {"first": first.numpy(), "block": runs[0 if early_stop else -1].numpy()}
    table = score(model, x.split(20), "", early_stop=early_stop)
    np.testing.assert_allclose(table.matrix(), minibatch_cka(rows, [40]), atol=1e-4)
    assert next(iter(table)).n == 40


def test_a_layer_that_stops_running_is_named() -> None:
    model, x = Branches(), inputs(40)
    with pytest.raises(ConfigError, match="this time 'b' did not run"), torch.no_grad():
        with LayerScoring("", max_norm=None).prepare(model) as hooked:
            hooked(x[:20])
            model.skip_b = True
            hooked(x[20:])
    table = hooked.hooking_context.scores()
    np.testing.assert_allclose(table.matrix(), minibatch_cka(branch_rows(model, x[:20]), [20]), atol=1e-4)


def test_a_convolutional_net_gives_one_row_per_picture() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 5))
    x = torch.randn(30, 2, 8, 8)
    with torch.no_grad():
        values = [model[0](x)]
        values += [torch.relu(values[0]), torch.relu(values[0]).flatten(1)]
        values.append(model[3](values[-1]))
    rows = {str(i): value.flatten(1).numpy() for i, value in enumerate(values)}
    table = score(model, x.split(10), r"\d", skip_first=0)
    np.testing.assert_allclose(table.matrix(), minibatch_cka(rows, [30]), atol=1e-4)
    assert np.abs(table.matrix()[0, 1] - 1) > 0.01


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"estimators": ["ckaa"]}, "unknown estimator 'ckaa'; did you mean 'cka'"),
        ({"estimators": []}, "estimators is empty; known ones: .*cka"),
        ({"estimators": [3]}, r"estimators holds registry names \(.*cka.*\) or estimator objects; got 3"),
        ({"max_norm": 1}, "max_norm counts median row lengths.*got 1"),
        ({"max_norm": float("nan")}, "got nan"),
        ({"max_norm": float("inf")}, "got inf"),
        ({"max_norm": "10"}, "got '10'"),
        ({"rows_per_update": 0}, "rows_per_update.*at least 8.*got 0"),
        ({"rows_per_update": 7}, "got 7"),
        ({"rows_per_update": 16.0}, "got 16.0"),
        ({"rows_per_update": True}, "got True"),
        ({"tokens": "lats"}, "unknown token selection 'lats'; did you mean 'last'"),
        ({"skip_first": -1}, "skip_first"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        LayerScoring("", **options)


def test_too_few_rows_say_how_many_there_are() -> None:
    model = Branches()
    with torch.no_grad(), LayerScoring("").prepare(model) as hooked:
        hooked(inputs(3))
    with pytest.raises(ConfigError, match="got 3 rows.*at least 4"):
        hooked.hooking_context.scores()


# A real model: what a few rows with massive activations do, and what is done about them.

RAW_AND_DEFAULT: dict[str, dict[str, Any]] = {
    "with first": {"skip_first": 0, "max_norm": None},
    "without first": {"skip_first": 1, "max_norm": None},
    "without outliers": {"skip_first": 0},
    "default": {},
}


@pytest.fixture(scope="module")
def smollm2_tables(smollm2: tuple[nn.Module, Any]) -> dict[tuple[str, str], Any]:
    """Score layers 10, 15 and 20 on single sentences and on windows cut out of running text, all in one pass each."""
    from tdprobe.hf import batches, demo_corpus

    model, tokenizer = smollm2
    texts = [row["text"] for row in demo_corpus()]
    windows = torch.tensor(tokenizer("\n".join(texts))["input_ids"][: 64 * 32]).reshape(64, 32)
    data = {
        "sentences": [batch.inputs for batch in batches(texts[::25], tokenizer, max_length=64)],
        "windows": [{"input_ids": windows[48:]}],
    }
    tables = {}
    for kind, given in data.items():
        contexts = {
            name: LayerScoring(r"layers\.(10|15|20)$", **options).prepare(model.model)
            for name, options in RAW_AND_DEFAULT.items()
        }
        with torch.no_grad(), contextlib.ExitStack() as stack:
            hooked = [stack.enter_context(context) for context in contexts.values()]
            for batch in given:
                hooked[0](**batch)
        tables |= {(kind, name): context.scores() for name, context in contexts.items()}
    return tables


def test_first_positions_decide_the_similarity_of_real_layers(smollm2_tables: dict[Any, Any]) -> None:
    first, rest = (smollm2_tables["sentences", name].matrix() for name in ("with first", "without first"))
    # Once they are massive, the first positions are all that a layer shows.
    assert first[1, 2] > 0.9999 and rest[1, 2] < 0.95
    # They become massive between layers 10 and 15, which therefore look different.
    assert first[0, 1] < rest[0, 1] - 0.2


def test_the_limit_on_row_lengths_finds_the_first_positions_by_itself(smollm2_tables: dict[Any, Any]) -> None:
    table = smollm2_tables["sentences", "without outliers"]
    assert table.meta["outliers"] == 32 and table.meta["rows"] == 32 + next(iter(table)).n
    np.testing.assert_allclose(table.matrix(), smollm2_tables["sentences", "without first"].matrix(), atol=0.01)


def test_leaving_out_the_first_position_alone_is_not_enough(smollm2_tables: dict[Any, Any]) -> None:
    # A window that begins inside a word has a second massive token: two of 496 rows turn alike into unlike.
    raw, default = smollm2_tables["windows", "without first"], smollm2_tables["windows", "default"]
    assert raw.meta["rows"] == default.meta["rows"] == 496 and default.meta["outliers"] == 2
    assert raw.matrix()[0, 1] < 0.3 < 0.8 < default.matrix()[0, 1]
