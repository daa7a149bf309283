"""Recipes: presets, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pace.errors import ConfigError
from pace.train.recipe import PRESETS, read_recipe

GOOD = """
[models]
target = "demo"
draft = "demo"

[[data]]
file = "x.jsonl"
"""


def read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return read_recipe(path)


@pytest.mark.parametrize(
    ("preset", "k", "rows", "lr"),
    [
        ("llama3", 8, 64 * 512, 1e-5),
        ("qwen2.5", 8, 64 * 512, 3e-5),
        ("deepseek-r1-qwen", 8, 64 * 1024, 8e-5),
        ("pard2-llama3", 16, 64 * 512, 1e-5),
        ("pard2-qwen3", 16, 64 * 1024, 3e-5),
    ],
)
def test_the_published_recipes_are_presets(tmp_path: Path, preset: str, k: int, rows: int, lr: float) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'preset = "{preset}"\n[[data]]\nfile = "x.jsonl"\n[training]\nepochs = 1\n')
    recipe = read_recipe(path)
    training = recipe.training
    assert (recipe.cod.k, training.batch_size * training.context_len, training.lr) == (k, rows, lr)
    assert training.epochs == 1.0, "the file's own value"
    assert recipe.loss.cat is preset.startswith("pard2")


def test_every_preset_is_tested() -> None:
    assert len(PRESETS) == 5


def test_a_recipe_without_options_is_the_papers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(GOOD)
    recipe = read_recipe(path)
    assert (recipe.cod.k, recipe.cod.retention, recipe.cod.min_retention) == (8, 0.7, 0.2)
    assert recipe.loss.normalization == "subtask" and not recipe.loss.needs_teacher


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data = []\n[models]\ndraft = 'demo'", "models.target is missing"),
        (GOOD + "[cod]\nk = 0", "cod.k is 0, expected a number from 1 to 33"),
        (GOOD + "[cod]\nK = 8", "cod.K is unknown, expected some of k, retention, min_retention"),
        (GOOD + "[cod]\nk = '8'", "cod.k is '8', expected int"),
        (GOOD + "[cod]\nretention = nan", "cod.retention is nan"),
        (GOOD + "[loss]\nce = 0", "loss.ce and loss.kl are both 0"),
        (GOOD + "[loss]\nnormalization = 'mean'", "expected one of subtask, pooled"),
        (GOOD + "[training]\ncontext_len = 8", "expected more than cod.k"),
        (GOOD + "[training]\nbetas = [0.9]", "training.betas is [0.9], expected two numbers"),
        (GOOD + "[training]\nsteps = true", "training.steps is True, expected int"),
        (GOOD + "answers = 'mine'", "data.answers is 'mine', expected one of target, file"),
        ("preset = 'gpt'\n" + GOOD, "preset is 'gpt', expected one of deepseek-r1-qwen"),
        ("data = []\n[models]\ntarget = 'a'\ndraft = 'b'", "no [[data]]"),
        ("data = 3\n[models]\ntarget = 'a'\ndraft = 'b'", "data is 3, expected a list"),
        ("data = []\nmodels = 1", "models is 1, expected a table"),
        ("[models]\ntarget = 'a'\ndraft = 'b'", "data is missing"),
        ("models = ", "not TOML"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert message in str(error.value) and "recipe.toml" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.toml")
