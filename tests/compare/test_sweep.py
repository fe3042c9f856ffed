"""Comparisons of checkpoints against float64 references, together in memory and one at a time."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tdprobe import hf
from tdprobe.compare import LayerComparison, checkpoints, compare_layers
from tdprobe.errors import ConfigError, StateError
from tdprobe.latent import ActivationCaching, CkaEstimator, LayerScoring
from tdprobe.tables import ScoreTable
from tiny_checkpoints import byte_llama, byte_tokenizer, save_checkpoint

BLOCKS = r"model\.layers\.\d$"
TEXTS = [f"{'abcdefgh'[i % 8] * (i % 5)}{i} is a number of {i * i + 3} letters" for i in range(24)]
BOTH = pytest.mark.parametrize("one_at_a_time", [False, True])


def compare(models: Any, batches: Any, layers: Any = BLOCKS, estimators: Any = ("cka",), **options: Any) -> ScoreTable:
    return compare_layers(models, batches, layers, estimators, **{"progress": False, "max_norm": None, **options})


def mlp(seed: int = 0, width: int = 7) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5))


def pictures(n: int = 60, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def unbiased_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear CKA of HSIC_1 with raw Grams (Song et al. 2012)."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n = len(k)
        sums = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * k.sum(0) @ m.sum(1)
        return sums / (n * (n - 3))

    k, m = (x.astype(np.float64) @ x.astype(np.float64).T for x in (a, b))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def reference(rows_a: dict[str, np.ndarray], rows_b: dict[str, np.ndarray]) -> np.ndarray:
    return np.array([[unbiased_cka(a, b) for b in rows_b.values()] for a in rows_a.values()])


def mlp_rows(model: nn.Module, x: Tensor) -> dict[str, np.ndarray]:
    rows = {}
    for name, part in model.named_children():
        x = part(x)
        rows[name] = x.detach().numpy()
    return rows


def token_rows(model: nn.Module, batch: dict[str, Tensor], skip_first: int = 1) -> dict[str, np.ndarray]:
    """Take the real tokens of right-padded texts, without the first of each."""
    with torch.no_grad(), ActivationCaching(BLOCKS).prepare(model) as hooked:
        hooked(**batch)
    mask = batch["attention_mask"].bool().clone()
    mask[:, :skip_first] = False
    return {name: value[mask].numpy() for name, value in hooked.hooking_context.cache.items()}


# What is scored.


@BOTH
def test_all_layers_of_two_models_meet(one_at_a_time: bool) -> None:
    a, b, x = mlp(0), mlp(1, width=9), pictures()
    table = compare({"a": a, "b": b}, x.split(10), r"\d", one_at_a_time=one_at_a_time)
    rows = {"a": mlp_rows(a, x), "b": mlp_rows(b, x)}
    assert table.checkpoints == ("a", "b") and table.layers("b") == ("0", "1", "2")
    for one, two in (("a", "a"), ("a", "b"), ("b", "b"), ("b", "a")):
        np.testing.assert_allclose(table.matrix("cka", one, two), reference(rows[one], rows[two]), atol=1e-4)
    assert {row.n for row in table} == {60}


def test_estimators_may_have_labels_of_the_users_own() -> None:
    model, x = mlp(), pictures()
    estimators = {"plain": CkaEstimator(), "debiased": CkaEstimator(unbiased=True)}
    table = compare(model, x.split(10), r"\d", estimators)
    rows = mlp_rows(model, x)
    np.testing.assert_allclose(table.matrix("debiased"), reference(rows, rows), atol=1e-5)
    a, b = (rows[name] - rows[name].mean(0) for name in "02")
    plain = np.linalg.norm(a.T @ b) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    np.testing.assert_allclose(table.matrix("plain")[0, 2], plain, atol=1e-5)


@BOTH
@pytest.mark.parametrize("same_object", [True, False])
def test_a_model_against_itself(one_at_a_time: bool, same_object: bool) -> None:
    model = mlp()
    models = {"a": model, "b": model if same_object else copy.deepcopy(model)}
    table = compare(models, pictures().split(12), r"\d", one_at_a_time=one_at_a_time)
    own, cross = table.matrix("cka", "a", "a"), table.matrix("cka", "a", "b")
    np.testing.assert_allclose(cross, own, atol=1e-5)
    np.testing.assert_allclose(table.matrix("cka", "b", "b"), own, atol=1e-5)
    np.testing.assert_allclose(cross, cross.T, atol=1e-5)
    np.testing.assert_allclose(np.diag(cross), 1, atol=1e-5)
    assert own[0, 2] < 0.95


@BOTH
def test_texts_of_a_perturbed_copy(one_at_a_time: bool) -> None:
    tokenizer = byte_tokenizer()
    models = {name: byte_llama(change=change) for name, change in (("base", 0.0), ("tuned", 0.05))}
    loaded = {name: hf.LoadedModel(model, tokenizer, name, None) for name, model in models.items()}
    table = compare(loaded, TEXTS, None, batch_size=7, one_at_a_time=one_at_a_time, rows_per_update=4096)
    batch = {name: torch.tensor(v) for name, v in tokenizer(TEXTS, padding=True).items() if name != "token_type_ids"}
    rows = {name: token_rows(model, batch) for name, model in models.items()}
    n = sum(len(text) - 1 for text in TEXTS)
    assert table.layers("tuned") == ("model.layers.0", "model.layers.1", "model.layers.2")
    for one, two in (("base", "base"), ("base", "tuned"), ("tuned", "tuned")):
        np.testing.assert_allclose(table.matrix("cka", one, two), reference(rows[one], rows[two]), atol=1e-4)
    assert {row.n for row in table} == {n} and table.meta["rows"] == n


def test_in_turns_equals_together_where_one_update_and_the_banks_hold_all_rows() -> None:
    models, x = {"a": mlp(0), "b": mlp(1)}, pictures(100).split(10)
    estimators = ["cka", CkaEstimator(), CkaEstimator(unbiased=True)]
    together = compare(models, x, r"\d", estimators, rows_per_update=100)
    turns = compare(models, x, r"\d", estimators, one_at_a_time=True)
    for one, two in zip(together.blocks, turns.blocks, strict=True):
        assert one.key == two.key and one.n == two.n == 100
        np.testing.assert_allclose(one.values, two.values, atol=1e-5)
    # In several updates the exact estimators still agree, and the minibatch one compares within updates only.
    minibatch = compare(models, x, r"\d", estimators, rows_per_update=10)
    for label in ("cka-2", "cka-3"):
        np.testing.assert_allclose(minibatch.matrix(label, "a", "b"), turns.matrix(label, "a", "b"), atol=1e-5)
    assert np.abs(minibatch.matrix("cka", "a", "b") - turns.matrix("cka", "a", "b")).max() > 1e-3


def test_a_small_bank_keeps_the_same_rows_of_every_checkpoint() -> None:
    model = mlp()
    table = compare(
        {"a": model, "b": copy.deepcopy(model)}, pictures(200).split(9), r"\d", one_at_a_time=True, bank_size=40
    )
    assert {row.n for row in table} == {40}
    np.testing.assert_allclose(table.matrix("cka", "a", "b"), table.matrix("cka", "a", "a"), atol=1e-5)
    whole = compare(model, pictures(200).split(9), r"\d", rows_per_update=200)
    assert 1e-4 < np.abs(table.matrix("cka", "a", "a") - whole.matrix()).max() < 0.2


@BOTH
def test_equal_samples_count_each_time(one_at_a_time: bool) -> None:
    tokenizer = byte_tokenizer()
    models = {"a": hf.LoadedModel(byte_llama(), tokenizer, "a", None)}
    table = compare(models, TEXTS + TEXTS[:5], tokens="mean", one_at_a_time=one_at_a_time)
    assert {row.n for row in table} == {29}
    ids = {"input_ids": torch.tensor(tokenizer(["equal", "equal"])["input_ids"])}
    table = compare(byte_llama(), [ids, ids, {"input_ids": ids["input_ids"].flip(1)}], one_at_a_time=one_at_a_time)
    assert {row.n for row in table} == {3 * 2 * 4}


@BOTH
def test_running_again_adds_rows(one_at_a_time: bool) -> None:
    models, x = {"a": mlp(0), "b": mlp(1)}, pictures(60)
    comparison = LayerComparison(
        models, r"\d", one_at_a_time=one_at_a_time, rows_per_update=512, max_norm=None, progress=False
    )
    comparison.run(x[:40].split(10))
    assert comparison.n_rows == 40
    first = comparison.scores()
    comparison.run(x[40:].split(10))
    assert comparison.n_rows == 60 and first.block("cka", "a", "b").n == 40
    whole = compare(models, [x], r"\d").matrix("cka", "a", "b")
    np.testing.assert_allclose(comparison.scores().matrix("cka", "a", "b"), whole, atol=1e-5)


# What batches may be.


@BOTH
@pytest.mark.parametrize("kind", ["list", "generator", "loader", "dicts", "tuples"])
def test_batches_of_every_kind_give_the_same(one_at_a_time: bool, kind: str) -> None:
    model, x = byte_llama(), torch.randint(2, 258, (24, 9), generator=torch.Generator().manual_seed(0))
    given = {
        "list": list(x.split(6)),
        "generator": (part for part in x.split(6)),
        "loader": DataLoader(x, batch_size=6),
        "dicts": [{"input_ids": part} for part in x.split(6)],
        "tuples": [(part,) for part in x.split(6)],
    }[kind]
    models = {"a": model, "b": byte_llama(change=0.05)}
    table = compare(models, given, one_at_a_time=one_at_a_time)
    batch = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    rows = [token_rows(found, batch) for found in models.values()]
    np.testing.assert_allclose(table.matrix("cka", "a", "b"), reference(*rows), atol=1e-4)


@BOTH
def test_a_loader_that_shuffles_still_pairs_rows(one_at_a_time: bool) -> None:
    model = mlp()
    loader = DataLoader(pictures(), batch_size=10, shuffle=True)
    table = compare({"a": model, "b": copy.deepcopy(model)}, loader, r"\d", one_at_a_time=one_at_a_time)
    np.testing.assert_allclose(np.diag(table.matrix("cka", "a", "b")), 1, atol=1e-5)


@BOTH
@pytest.mark.parametrize("kind", ["generator", "array"])
def test_texts_may_come_from_anywhere(one_at_a_time: bool, kind: str) -> None:
    models = {"a": hf.LoadedModel(byte_llama(), byte_tokenizer(), "a", None)}
    given = (text for text in TEXTS) if kind == "generator" else np.array(TEXTS)
    wanted = compare(models, TEXTS, one_at_a_time=one_at_a_time)
    assert compare(models, given, one_at_a_time=one_at_a_time).blocks == wanted.blocks


@BOTH
@pytest.mark.parametrize(
    ("batches", "problem"),
    [
        (torch.ones(4, 6), "got one Tensor: put it into a list"),
        ("a text", "got one str"),
        ({"input_ids": torch.ones(1, 2)}, "got one dict"),
        (3, "got one int"),
        ([], "batches is empty"),
        (iter(()), "batches is empty"),
        (["a text"], "checkpoint 'model' is a model without a tokenizer.*LoadedModel"),
    ],
)
def test_what_is_no_list_of_batches_is_refused(one_at_a_time: bool, batches: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        compare(mlp(), batches, r"\d", one_at_a_time=one_at_a_time)


# Different tokenizers.


def scrambled_tokenizer() -> Any:
    """Return a tokenizer that gives as many tokens as that of bytes, but others."""
    tokenizer = byte_tokenizer()
    text = tokenizer.backend_tokenizer.to_str().replace('"a":', '"swap":').replace('"b":', '"a":')
    backend = type(tokenizer.backend_tokenizer).from_str(text.replace('"swap":', '"b":'))
    return type(tokenizer)(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@BOTH
def test_rows_of_other_tokens_are_never_paired_even_where_counts_agree(one_at_a_time: bool) -> None:
    ours, theirs = byte_tokenizer(), scrambled_tokenizer()
    texts = [f"{i}ab{i * i}ba" for i in range(12)]
    assert all(len(ours(t)["input_ids"]) == len(theirs(t)["input_ids"]) for t in texts)
    assert ours(texts[0]) != theirs(texts[0])
    models = {name: hf.LoadedModel(byte_llama(), t, name, None) for name, t in (("ours", ours), ("theirs", theirs))}
    n = sum(len(text) - 1 for text in texts)
    with pytest.raises(ConfigError, match=f"rows 'ours': {n}, 'theirs': {n}.*tokens='last' or tokens='mean'"):
        compare(models, texts, one_at_a_time=one_at_a_time)
    for tokens in ("last", "mean"):
        assert {row.n for row in compare(models, texts, tokens=tokens, one_at_a_time=one_at_a_time)} == {12}


class Halving:
    """A tokenizer that reads every second letter, so that short texts have a single token."""

    def __init__(self) -> None:
        self._bytes = byte_tokenizer()

    def __call__(self, texts: list[str], **options: Any) -> Any:
        return self._bytes([text[::2] for text in texts], **options)

    def __len__(self) -> int:
        return len(self._bytes)

    def __getattr__(self, name: str) -> Any:
        if name == "_bytes":
            raise AttributeError(name)
        return getattr(self._bytes, name)


@BOTH
def test_a_text_that_one_checkpoint_cannot_use_is_left_out_and_counted(one_at_a_time: bool) -> None:
    models = {
        "a": hf.LoadedModel(byte_llama(), byte_tokenizer(), "a", None),
        "b": hf.LoadedModel(byte_llama(), Halving(), "b", None),
    }
    # "xy" is one token for the second tokenizer, and the first token never counts.
    texts = [*TEXTS[:10], "xy", *TEXTS[10:]]
    table = compare(models, texts, tokens="last", batch_size=6, one_at_a_time=one_at_a_time, rows_per_update=64)
    assert {row.n for row in table} == {24} and table.meta["rows_left_out"] == 1
    wanted = compare(models, TEXTS, tokens="last", batch_size=6, rows_per_update=64)
    assert "rows_left_out" not in wanted.meta
    for block, other in zip(table.blocks, wanted.blocks, strict=True):
        np.testing.assert_allclose(block.values, other.values, atol=1e-5)


@BOTH
def test_a_batch_of_short_texts_ends_nothing(one_at_a_time: bool) -> None:
    models = {name: hf.LoadedModel(byte_llama(), byte_tokenizer(), name, None) for name in "ab"}
    texts = [*TEXTS[:12], "x", *TEXTS[12:]]
    for tokens in ("last", "all"):
        options = {"tokens": tokens, "one_at_a_time": one_at_a_time, "rows_per_update": 4096}
        table = compare(models, texts, batch_size=1, **options)
        wanted = compare(models, TEXTS, batch_size=1, **options)
        assert [block.n for block in table.blocks] == [block.n for block in wanted.blocks]
        for block, other in zip(table.blocks, wanted.blocks, strict=True):
            np.testing.assert_allclose(block.values, other.values, atol=1e-5)


@pytest.fixture(scope="module")
def real_models(smollm2: tuple[nn.Module, Any], minilm: tuple[nn.Module, Any]) -> dict[str, hf.LoadedModel]:
    pairs = {"smollm2": smollm2, "minilm": minilm}
    return {name: hf.LoadedModel(model, tokenizer, name, None) for name, (model, tokenizer) in pairs.items()}


LAYERS = {"smollm2": r"model\.layers\.(2|4)$", "minilm": r"encoder\.layer\.[135]$"}


@pytest.mark.filterwarnings("ignore:.*texts are longer than 16 tokens")
@pytest.mark.parametrize("tokens", ["mean", "last"])
def test_models_with_other_tokenizers_meet_text_by_text(real_models: dict[str, Any], tokens: str) -> None:
    texts = [row["text"] for row in hf.demo_corpus()[:200:10]]
    options = {"tokens": tokens, "max_length": 16, "rows_per_update": 64, "batch_size": 8}
    together = compare(real_models, texts, LAYERS, **options)
    turns = compare(real_models, texts, LAYERS, **options, one_at_a_time=True)
    assert {row.n for row in together} == {20} == {row.n for row in turns}
    cross = together.matrix("cka", "smollm2", "minilm")
    assert cross.shape == (2, 3)
    np.testing.assert_allclose(turns.matrix("cka", "smollm2", "minilm"), cross, atol=1e-4)

    assert together.layers("minilm") == tuple(f"encoder.layer.{i}" for i in (1, 3, 5))
    assert cross.max() > 0.15


@pytest.mark.filterwarnings("ignore:.*texts are longer than 16 tokens")
@BOTH
def test_models_with_other_tokenizers_share_no_tokens(real_models: dict[str, Any], one_at_a_time: bool) -> None:
    texts = [row["text"] for row in hf.demo_corpus()[:3]]
    counts = [
        sum(min(len(loaded.tokenizer(text)["input_ids"]), 16) - 1 for text in texts) for loaded in real_models.values()
    ]
    problem = f"rows 'smollm2': {counts[0]}, 'minilm': {counts[1]}"
    assert counts[0] != counts[1]
    with pytest.raises(ConfigError, match=problem):
        compare(real_models, texts, LAYERS, max_length=16, one_at_a_time=one_at_a_time)


# Names, patterns, loading.


def test_each_checkpoint_may_have_a_pattern_of_its_own() -> None:
    table = compare({"a": mlp(), "b": mlp()}, [pictures()], {"a": "0|2", "b": "1"})
    assert table.layers("a") == ("0", "2") and table.layers("b") == ("1",)
    assert table.matrix("cka", "a", "b").shape == (2, 1)
    assert table.meta["checkpoints"]["a"]["layers"] == "0|2"


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ({"a": "0"}, r"one pattern for each checkpoint \('a', 'b'\); it has 'a'"),
        ({"a": "0", "b": "1", "c": "2"}, "it has 'a', 'b', 'c'"),
        ("nowhere", "'nowhere' matches no module of Sequential; close names"),
        ("(", r"pattern of layers '\(' is no regular expression"),
        (3, "a module pattern is a regular expression"),
    ],
)
def test_patterns_that_cannot_work_are_refused(layers: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        compare({"a": mlp(), "b": mlp()}, [pictures()], layers)


@pytest.mark.parametrize(
    ("models", "options", "problem"),
    [
        ({}, {}, "no checkpoint to compare"),
        ({"a": 3}, {}, "checkpoint 'a' is a int"),
        ({"a": mlp()}, {"estimators": ["ckaa"]}, "unknown estimator 'ckaa'; did you mean 'cka'"),
        ({"a": mlp()}, {"tokens": "lst"}, "did you mean 'last'"),
        ({"a": mlp()}, {"bank_size": 0}, "size=0"),
        ({"a": mlp()}, {"rows_per_update": 3}, "rows_per_update"),
        ({"a": mlp()}, {"max_norm": 0.5}, "max_norm"),
        ({"a": "./no/such/folder"}, {}, "no folder './no/such/folder'"),
    ],
)
def test_arguments_are_checked_before_anything_runs(models: Any, options: Any, problem: str) -> None:
    def batches() -> Any:
        raise AssertionError("walked")
        yield

    with pytest.raises(ConfigError, match=problem):
        compare(models, batches(), r"\d", **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sweep")
    return {name: save_checkpoint(root / name, change=change) for name, change in (("base", 0.0), ("tuned", 0.05))}


@BOTH
@pytest.mark.parametrize("kind", [str, Path])
def test_folders_are_loaded_and_scored(folders: dict[str, Path], kind: Any, one_at_a_time: bool) -> None:
    table = compare({n: kind(p) for n, p in folders.items()}, TEXTS, one_at_a_time=one_at_a_time)
    models = {
        n: hf.LoadedModel(byte_llama(change=c), byte_tokenizer(), n, None) for n, c in (("base", 0.0), ("tuned", 0.05))
    }
    wanted = compare(models, TEXTS, one_at_a_time=one_at_a_time)
    assert table.blocks == wanted.blocks
    about = table.meta["checkpoints"]
    assert about["base"]["fingerprint"] != about["tuned"]["fingerprint"]
    assert about["base"]["class"] == "LlamaForCausalLM" and str(folders["base"].parent) not in str(table.meta)
    assert ScoreTable.from_json(table.to_json()) == table
    assert table.meta["versions"]["torch"] == torch.__version__


def test_memory_decides_whether_checkpoints_take_turns(folders: dict[str, Path], monkeypatch: Any) -> None:
    assert not LayerComparison(folders).one_at_a_time
    monkeypatch.setattr(checkpoints, "free_bytes", lambda device: 1000)
    assert LayerComparison(folders).one_at_a_time
    assert not LayerComparison(folders, one_at_a_time=False).one_at_a_time
    assert not LayerComparison({"a": mlp(), "b": str(folders["base"])}).one_at_a_time


def test_a_checkpoint_is_gone_before_the_next_one_is_loaded(folders: dict[str, Path], monkeypatch: Any) -> None:
    load, alive = hf.load, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        assert not [model for model in alive if model() is not None]
        loaded = load(*args, **kwargs)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(hf, "load", watched)
    table = compare({**folders, "again": folders["base"]}, TEXTS, one_at_a_time=True)
    assert len(alive) == 3 and table.checkpoints == ("base", "tuned", "again")
    np.testing.assert_allclose(np.diag(table.matrix("cka", "base", "again")), 1, atol=1e-5)


# What is left behind.


@BOTH
@pytest.mark.parametrize("strike", [1, 3, 6])
def test_an_interrupt_keeps_what_all_checkpoints_have_finished(hooks_of: Any, one_at_a_time: bool, strike: int) -> None:
    models, x, calls = {"a": mlp(0).train(), "b": mlp(1).train()}, pictures(60), []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == strike:
            raise KeyboardInterrupt

    handle = models["b"].register_forward_pre_hook(interrupt)
    hooks = [hooks_of(model) for model in models.values()]
    comparison = LayerComparison(models, r"\d", one_at_a_time=one_at_a_time, max_norm=None, progress=False)
    with pytest.raises(KeyboardInterrupt):
        comparison.run(x.split(10))
    handle.remove()
    assert [hooks_of(model) for model in models.values()] == [hooks[0], hooks[1] - 1]
    assert all(part.training for model in models.values() for part in model.modules())
    done = 10 * (strike - 1)
    if done:
        table = comparison.scores()
        assert comparison.n_rows == done == table.block("cka", "a", "b").n
        wanted = reference(mlp_rows(models["a"], x[:done]), mlp_rows(models["b"], x[:done]))
        np.testing.assert_allclose(table.matrix("cka", "a", "b"), wanted, atol=1e-4)
    elif one_at_a_time:
        # The first checkpoint is complete, and there is no other.
        assert comparison.scores().checkpoints == ("a",) and comparison.n_rows == 60
    else:
        assert comparison.n_rows == 0
        with pytest.raises(StateError, match="no row has been scored yet"):
            comparison.scores()


@BOTH
def test_modes_gradients_and_hooks_are_as_before(hooks_of: Any, one_at_a_time: bool) -> None:
    model = byte_llama().train()
    model.model.layers[1].eval()
    modes = [part.training for part in model.modules()]
    hooks = hooks_of(model)
    compare(model, [{"input_ids": torch.randint(2, 258, (8, 9))}], one_at_a_time=one_at_a_time)
    assert [part.training for part in model.modules()] == modes and hooks_of(model) == hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Moody(nn.Module):
    """Leaves a layer out on request."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x[0, 0] > 0 else self.a(x) + self.b(x)


@BOTH
def test_a_layer_that_stops_running_is_named(one_at_a_time: bool) -> None:
    x = pictures(20)
    x[:, 0] = -1
    other = x.clone()
    other[:, 0] = 1
    with pytest.raises(ConfigError, match="this time '.*b' did not run"):
        compare({"moody": Moody()}, [x, other], "[ab]$", one_at_a_time=one_at_a_time)


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.heads = 0

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.block(x))
        self.heads += 1
        return self.head(x)


def test_passes_end_early_only_where_no_layer_runs_again() -> None:
    model, x = Looped(), pictures(40)
    table = compare(model, x.split(10), "block|head")
    with torch.no_grad(), LayerScoring("block|head", max_norm=None, skip_first=0).prepare(model) as hooked:
        hooked(x)
    np.testing.assert_allclose(table.matrix(), hooked.hooking_context.scores().matrix(), atol=1e-5)
    model.heads = 0
    compare(model, x.split(10), "block")
    assert model.heads == 4
    llama, heads = byte_llama(), []
    llama.lm_head.register_forward_hook(lambda *_: heads.append(1))
    compare(llama, list(torch.randint(2, 258, (40, 5)).split(10)))
    # The first pass tells which layers run how often.
    assert len(heads) == 1


def test_too_few_rows_and_no_rows() -> None:
    with pytest.raises(ConfigError, match="got 3 rows.*at least 4"):
        compare(mlp(), [pictures(3)], r"\d")
    for one_at_a_time in (False, True):
        with pytest.raises(StateError, match="no row has been scored yet"):
            LayerComparison(mlp(), r"\d", one_at_a_time=one_at_a_time).scores()


@BOTH
def test_tokens_that_no_text_has_are_named(one_at_a_time: bool) -> None:
    comparison = LayerComparison(byte_llama(), tokens=500, one_at_a_time=one_at_a_time, progress=False)
    comparison.run([torch.ones(4, 9, dtype=torch.long)])
    with pytest.raises(StateError, match="no row has been scored yet.*tokens='500' and skip_first=1 leave"):
        comparison.scores()


def test_estimators_that_read_labels_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(
        ConfigError, match=r"'mig' reads 'attributes' .* LayerScoring\(.*hooked\(x, attributes=\.\.\.\)"
    ):
        LayerComparison("no model", estimators=["cka", "mig"])
    with pytest.raises(ConfigError, match="'bends' reads 'attributes' and 'path' along with the layers"):
        LayerComparison("no model", estimators={"bends": "smoothness"})
