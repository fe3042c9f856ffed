"""Models, hook counting and a browser for every test."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

# pytest-xdist brings the parallel work; a second pool of threads in each worker would only slow it down.
torch.set_num_threads(1)

# An estimator of another package: it may come in by its entry point only.
collect_ignore = ["foreign_package"]

SESSION_MODELS = ("smollm2", "minilm", "tiny_llama")
HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def all_hooks(model: nn.Module) -> list[Any]:
    """List the hooks of every kind on every module of ``model``."""
    tables = [getattr(module, table) or {} for module in model.modules() for table in HOOK_TABLES]
    return [hook for table in tables for hook in table.values()]


def lasting_hooks(model: nn.Module) -> int:
    """Count the hooks that a test may not leave: transformers keeps its own capture hooks for good."""
    return sum(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in all_hooks(model))


def load_float32(name: str) -> tuple[nn.Module, Any]:
    """Load one of the embedded models and its tokenizer."""
    # Not at the head of the file: transformers takes a second, and most test files do without it.
    from tdprobe.hf import models

    loaded = models.load(name, dtype="float32")
    return loaded.model, loaded.tokenizer


@pytest.fixture(scope="session")
def hooks_of() -> Callable[[nn.Module], int]:
    """Return the function that counts the hooks of every kind that a test may not leave on any module of a model."""
    return lasting_hooks


@pytest.fixture(scope="session")
def smollm2() -> tuple[nn.Module, Any]:
    """Return SmolLM2 (30 layers, width 576, float32, eval mode) and its tokenizer."""
    return load_float32("demo")


@pytest.fixture(scope="session")
def minilm() -> tuple[nn.Module, Any]:
    """Return all-MiniLM-L6-v2 (6 layers, width 384, float32, eval mode) and its tokenizer."""
    return load_float32("demo-encoder")


@pytest.fixture(scope="session")
def tiny_llama() -> nn.Module:
    """Return a Llama of 4 layers and width 32 with random weights, the same in every run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def new_llama(tiny_llama: nn.Module) -> nn.Module:
    """Return `tiny_llama` made anew: capture hooks of transformers, which others leave on it, cannot be saved."""
    model = type(tiny_llama)(copy.deepcopy(tiny_llama.config)).eval()
    model.load_state_dict(tiny_llama.state_dict())
    return model


@pytest.fixture(autouse=True)
def no_hooks_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a hook on a model that later tests use."""
    used = {name: request.getfixturevalue(name) for name in SESSION_MODELS if name in request.fixturenames}
    models = {name: value if isinstance(value, nn.Module) else value[0] for name, value in used.items()}
    before = {name: lasting_hooks(model) for name, model in models.items()}
    yield
    left = {name: lasting_hooks(model) - before[name] for name, model in models.items()}
    assert not any(left.values()), f"hooks left behind (or taken away) by the test, model by model: {left}"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return headless Chromium, driven by selenium, with its console readable by ``get_log("browser")``."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        advice = "on Debian: apt-get install chromium chromium-driver"
        # A machine without a browser may test the rest; where everything must run, its absence is a failure.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {' and no '.join(missing)} found; {advice}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs["chromedriver"]))
    yield driver
    driver.quit()
