"""The model from scratch, and a named one expanded."""

import json
from pathlib import Path

import pytest
import torch
from tokenizer_dataset import TEMPLATE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from recast_cli.core.spelling import spell
from recast_cli.errors import ArtifactError
from recast_cli.tokenizer.model import write_expanded_model, write_scratch_model

WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "mat"]


def test_scratch_model_has_the_promised_size(tmp_path: Path) -> None:
    made = write_scratch_model(tmp_path / "model", (64, 64, 64), chat_template=TEMPLATE, seed=0)
    attention = 128 * 128 * 2 + 128 * 64 * 2 + 2 * 32  # q and o, k and v, their norms
    layer = attention + 3 * 128 * 512 + 2 * 128
    expected = 4 * layer + 128 + (3 + 2 + 3 * 64) * 128  # the output shares the embedding
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert made.num_parameters == expected == sum(weight.numel() for weight in model.parameters())
    assert 1e6 < made.num_parameters < 2e6
    assert made.architecture == "Qwen3ForCausalLM"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_scratch_folder_agrees_with_its_vocabulary(tmp_path: Path) -> None:
    made = write_scratch_model(
        tmp_path / "model", (4, 4), chat_template=TEMPLATE, seed=0, hidden_size=64, num_layers=1
    )
    model, tokenizer = _load(tmp_path / "model")
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == len(tokenizer) == model.config.vocab_size == made.vocabulary.vocab_size == 13
    assert made.vocabulary.embedding_rows == 13
    assert tokenizer.pad_token_id == model.config.pad_token_id == made.vocabulary.pad
    assert tokenizer.eos_token_id == model.config.eos_token_id
    stored = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert set(stored) <= {
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "transformers_version",
        "_from_model_config",
    }
    assert tokenizer.padding_side == "left"


def test_chat_template_renders_a_history(tmp_path: Path) -> None:
    write_scratch_model(
        tmp_path / "model", (4, 4, 4), chat_template=TEMPLATE, seed=0, hidden_size=64, num_layers=1
    )
    _, tokenizer = _load(tmp_path / "model")
    history = [(0, 1, 2), (3, 0, 1)]
    messages = [{"role": "user", "content": spell(codes, enclose=False)} for codes in history]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "".join(map(spell, history)) + "<|sid_begin|>"
    assert len(tokenizer(text)["input_ids"]) == 2 * 5 + 1


def test_scratch_weights_follow_the_seed_alone(tmp_path: Path) -> None:
    sizes = {"chat_template": TEMPLATE, "hidden_size": 64, "num_layers": 1}
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_scratch_model(tmp_path / name, (4, 4), seed=seed, **sizes)
        assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"
        torch.manual_seed(123)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return _write_base(tmp_path / "base", rows=len(WORDS))


def _write_base(folder: Path, *, rows: int, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ 'old' }}",
    )
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _load(folder: Path) -> tuple:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expansion_keeps_what_the_base_knew(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    base = _write_base(tmp_path / "base", rows=len(WORDS), tied=tied, dtype=dtype)
    made = write_expanded_model(tmp_path / "new", base, (4, 3), chat_template=TEMPLATE, seed=0)
    old, old_tokenizer = _load(base)
    new, tokenizer = _load(tmp_path / "new")
    prompt = "the cat sat on the mat"
    ids = old_tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert tokenizer(prompt)["input_ids"] == ids[0].tolist()
    with torch.inference_mode():
        # Wider matrix products may round differently in the last bit; the rows themselves stay.
        torch.testing.assert_close(new(ids).logits[..., : len(WORDS)], old(ids).logits)
    for table in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(new, table)().weight[: len(WORDS)], getattr(old, table)().weight)
    assert new.dtype == old.dtype == dtype and made.dtype == str(dtype).removeprefix("torch.")
    # The base has no pad token: one is added, then begin, end and 4 + 3 codes.
    assert len(tokenizer) == made.vocabulary.vocab_size == len(WORDS) + 1 + 2 + 7
    assert tokenizer.pad_token_id == made.vocabulary.pad == len(WORDS)
    assert made.vocabulary.level_offsets == (len(WORDS) + 3, len(WORDS) + 7)
    assert len(tokenizer(spell((3, 2)))["input_ids"]) == 4
    assert tokenizer.decode(tokenizer(spell((3, 2)))["input_ids"], skip_special_tokens=True).replace(
        " ", ""
    ) == spell((3, 2))
    assert tokenizer.chat_template == TEMPLATE
    stored = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert not {"do_sample", "temperature", "top_k", "repetition_penalty"} & set(stored)


def test_new_rows_are_near_the_mean_and_distinct(tmp_path: Path, base: Path) -> None:
    write_expanded_model(tmp_path / "new", base, (4, 3), chat_template=TEMPLATE, seed=0)
    new, _ = _load(tmp_path / "new")
    for table_VD in (new.get_input_embeddings().weight, new.get_output_embeddings().weight):
        old_VD, added_VD = table_VD[: len(WORDS)], table_VD[len(WORDS) :]
        scaled = (added_VD - old_VD.mean(0)) / old_VD.std(0)
        assert scaled.abs().max() < 0.1 * 6  # noise of a tenth of the spread, six sigma
        assert 0.05 < scaled.std() < 0.2
        assert len(torch.unique(added_VD, dim=0)) == len(added_VD)


def test_padded_vocabulary_keeps_its_rows(tmp_path: Path) -> None:
    base = _write_base(tmp_path / "base", rows=64)
    made = write_expanded_model(tmp_path / "new", base, (4, 3), chat_template=TEMPLATE, seed=0)
    new, tokenizer = _load(tmp_path / "new")
    assert made.vocabulary.embedding_rows == new.get_input_embeddings().weight.shape[0] == 64
    assert made.vocabulary.vocab_size == len(tokenizer) == len(WORDS) + 10
    old, _ = _load(base)
    torch.testing.assert_close(
        new.get_input_embeddings().weight[made.vocabulary.vocab_size :],
        old.get_input_embeddings().weight[made.vocabulary.vocab_size :],
    )


def test_expanding_twice_changes_nothing(tmp_path: Path, base: Path) -> None:
    first = write_expanded_model(tmp_path / "one", base, (4, 3), chat_template=TEMPLATE, seed=0)
    second = write_expanded_model(tmp_path / "two", tmp_path / "one", (4, 3), chat_template=TEMPLATE, seed=9)
    assert first.vocabulary == second.vocabulary
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "two/model.safetensors"
    ).read_bytes()


def test_bad_bases_are_named(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json not found"):
        write_expanded_model(tmp_path / "new", tmp_path / "absent", (4, 3), chat_template=TEMPLATE, seed=0)
    (base / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="cannot be loaded: "):
        write_expanded_model(tmp_path / "new", base, (4, 3), chat_template=TEMPLATE, seed=0)
    assert not (tmp_path / "new").exists()
