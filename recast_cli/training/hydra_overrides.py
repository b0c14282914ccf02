"""Overrides as Hydra reads them: values as text, and whether verl's configuration takes them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from recast_cli.errors import EnvironmentFault, RecipeError

# The configuration that each module composes, by name, in verl/trainer/config.
CONFIGS = {"verl.trainer.main_ppo": "ppo_trainer", "verl.trainer.sft_trainer": "sft_trainer_engine"}


def require_config(module: list[str], arguments: list[str]) -> None:
    """Compose verl's configuration as the job will, from its files: verl itself is not imported.

    Raises:
        RecipeError: an override that Hydra cannot read, or of a key that verl does not have.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    verl = importlib.util.find_spec("verl")
    if verl is None or verl.origin is None:
        raise EnvironmentFault("verl is not installed", "see `recast doctor`")
    try:
        with initialize_config_dir(str(Path(verl.origin).parent / "trainer" / "config"), version_base=None):
            compose(CONFIGS[module[-1]], overrides=arguments)
    except (HydraException, OmegaConfBaseException, ValueError) as exc:
        problem = " ".join(str(exc).split("full_key")[0].split())
        raise RecipeError(
            f"{module[-1]} refuses an override of the recipe: {problem}",
            "see the keys under verl: and verl_sft:; + before a key adds one that verl does not have",
        ) from exc


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_text(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    return str(value)


def overrides(options: dict[str, Any]) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in options.items()]


def quoted(path: str | Path) -> str:
    """A path as a Hydra value: quoted, so that blanks, commas and `=` in it stay what they are."""
    # Hydra's grammar: a backslash escapes only before a quote, and at the end it would escape ours.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + (m[2] and "\\'"), str(path)) + "'"
