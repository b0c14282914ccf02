"""Model folders: which of them RL can start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from artifacts_by_hand import Write
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel
from typer.testing import CliRunner

from recast_cli.errors import ArtifactError
from recast_cli.evaluation.evaluate import evaluate_model
from recast_cli.main import app
from recast_cli.models import load_model, require_start

CODES = [(0, 0, 0), (0, 1, 1), (1, 0, 1)]
LOG = {"u1": [0, 1, 2, 0, 1], "u2": [1, 2, 0, 1, 2]}


def test_a_copy_of_the_tokenizers_model_is_a_start(write: Write, tmp_path: Path) -> None:
    folders = write(LOG, CODES, (2, 2, 2))
    require_start(folders.model, folders.tokenizer)
    require_start(Path(shutil.copytree(folders.model, tmp_path / "copy")), folders.tokenizer)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("tokenizer.json", None, None, "has another tokenizer than"),
        ("tokenizer.json", "<s_a_1>", "<s_a_7>", "has another tokenizer than"),
        ("chat_template.jinja", None, None, "has another chat template than"),
        ("chat_template.jinja", "messages", "messages[1:]", "has another chat template than"),
        ("config.json", None, None, "has no config.json"),
        ("model.safetensors", None, None, r"has no weights \(\*\.safetensors or"),
    ],
)
def test_a_model_that_would_read_prompts_otherwise_is_refused(
    write: Write, tmp_path: Path, name: str, old: str | None, new: str | None, message: str
) -> None:
    folders = write(LOG, CODES, (2, 2, 2))
    model = Path(shutil.copytree(folders.model, tmp_path / "copy"))
    if old is None or new is None:
        (model / name).unlink()
    else:
        text = (model / name).read_text(encoding="utf-8")
        assert old in text
        (model / name).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ArtifactError, match=f"model {model} {message}"):
        require_start(model, folders.tokenizer)


def test_a_start_that_lacks_weights_is_refused(write: Write, tmp_path: Path) -> None:
    """verl would draw them at random, and say so in a warning."""
    folders = write(LOG, CODES, (2, 2, 2))
    model = Path(shutil.copytree(folders.model, tmp_path / "copy"))
    weights = load_file(model / "model.safetensors")
    weights.pop("model.layers.0.mlp.down_proj.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lacks weights: model\.layers\.0\.mlp\.down_proj\.weight\n"):
        require_start(model, folders.tokenizer)


def test_a_model_with_too_few_positions_is_refused(write: Write, tmp_path: Path) -> None:
    folders = write(LOG, CODES, (2, 2, 2))  # validation: three items of 5 tokens, begin, three codes: 19
    model = Path(shutil.copytree(folders.model, tmp_path / "copy"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    for positions, ok in ((19, True), (18, False)):
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
        if ok:
            evaluate_model(model, folders.tokenizer, folders.data, "validation")
        else:
            with pytest.raises(
                ArtifactError, match="reads at most 18 tokens, a prompt and its answer take 19"
            ):
                evaluate_model(model, folders.tokenizer, folders.data, "validation")


def test_a_model_without_a_key_value_cache_is_refused(tmp_path: Path) -> None:
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertLMHeadModel(BertConfig(vocab_size=20, **config)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ArtifactError, match="bert is a BertLMHeadModel, needed a decoder with a key-value"):
        load_model(tmp_path / "bert", 20, "cpu")


def test_train_and_profile_refuse_it_before_anything_runs(write: Write, tmp_path: Path) -> None:
    folders = write(LOG, CODES, (2, 2, 2))
    recipe = tmp_path / "recipe.yaml"
    places = {"data": folders.data, "tokenizer": folders.tokenizer, "out": tmp_path / "run"}
    recipe.write_text(json.dumps({name: str(path) for name, path in places.items()}), encoding="utf-8")
    absent = tmp_path / "absent"
    for words in (
        ["train", str(recipe), f"model={absent}"],
        ["train", str(recipe), f"model={absent}", "--dry-run"],
        ["profile", str(recipe), "--model", str(absent), "--out", str(tmp_path / "profile")],
    ):
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, ArtifactError), done.output
        assert done.exception.message == f"model {absent} has no config.json"
    assert not (tmp_path / "run").exists() and not (tmp_path / "profile").exists()
