"""Artifacts and a recipe for the training stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_artifacts import write_artifacts

from recast_cli.recipe import Recipe
from recast_cli.training.inputs import Inputs

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(dataset, tokenizer), the test's own."""
    return write_artifacts(tmp_path)


@pytest.fixture
def make_recipe(folders: tuple[Path, Path], tmp_path: Path) -> MakeRecipe:
    def make(**values: object) -> Recipe:
        given = {"data": str(folders[0]), "tokenizer": str(folders[1]), "out": str(tmp_path / "run")}
        return Recipe.model_validate({**given, "device": "cpu", **values})

    return make


@pytest.fixture
def inputs(make_recipe: MakeRecipe) -> Inputs:
    return Inputs.load(make_recipe())
