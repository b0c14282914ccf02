"""ItemSFTDataset against verl's stock dataset, row by row, on a real tokenizer artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

from recast_cli.training.run import continued_sft_rows
from verl_recast.sft_dataset import ItemSFTDataset


def both(tokenizer_folder: Path, parquet: Path, **options: Any) -> tuple[ItemSFTDataset, MultiTurnSFTDataset]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "model")
    config = OmegaConf.create({"max_length": 64, "truncation": "error", **options})
    return (
        ItemSFTDataset(str(parquet), tokenizer, config),
        MultiTurnSFTDataset(str(parquet), tokenizer, config),
    )


def assert_equal_rows(ours: ItemSFTDataset, stock: MultiTurnSFTDataset) -> None:
    assert len(ours) == len(stock) > 0
    for _ in range(2):  # the second epoch comes from memory
        for i in range(len(stock)):
            found, expected = ours[i], stock[i]
            assert found.keys() == expected.keys() and len(expected) >= 3
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor), (i, name)


# verl 0.9.1's own default is the text "none", which it takes for True.
@pytest.mark.parametrize("thinking", [{}, {"enable_thinking_default": "none"}])
@pytest.mark.parametrize("pad_mode", ["no_padding", "right"])
def test_equals_verls_own_dataset_on_the_warm_starts_windows(
    tokenizer_folder: Path, pad_mode: str, thinking: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = tokenizer_folder / "verl" / "sft.parquet"
    ours, stock = both(tokenizer_folder, parquet, pad_mode=pad_mode, **thinking)
    assert_equal_rows(ours, stock)

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("an item that was read before is tokenised again")

    monkeypatch.setattr(ours.tokenizer, "apply_chat_template", fail)
    assert len(ours[0]["input_ids"]) > 0


def test_learns_codes_and_end_of_learned_items_and_nothing_of_context(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(tokenizer_folder / "verl" / "rl.parquet").slice(0, 40)
    pq.write_table(continued_sft_rows(rows), tmp_path / "rows.parquet")
    ours, stock = both(tokenizer_folder, tmp_path / "rows.parquet", pad_mode="no_padding")
    assert_equal_rows(ours, stock)
    row = ours[len(ours) - 1]
    # begin, 3 codes, end for each item; of the last item all but its begin
    assert row["loss_mask"].tolist() == [0] * (len(row["loss_mask"]) - 4) + [1] * 4


def test_rows_do_not_share_memory_with_what_is_remembered(tokenizer_folder: Path) -> None:
    ours, stock = both(tokenizer_folder, tokenizer_folder / "verl" / "sft.parquet", pad_mode="no_padding")
    expected = stock[0]["input_ids"]
    ours[0]["input_ids"].fill_(0)
    ours[0]["loss_mask"].fill_(0)
    assert torch.equal(ours[0]["input_ids"], expected)
    assert torch.equal(ours[0]["loss_mask"], stock[0]["loss_mask"])


def test_one_message_as_context_and_as_target_is_not_confused(tokenizer_folder: Path, tmp_path: Path) -> None:
    first = "<s_a_1><s_b_1><s_c_1>"
    messages = [
        [{"role": "user", "content": first}, {"role": "assistant", "content": first}],
        [{"role": "assistant", "content": first}, {"role": "user", "content": first}],
    ]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "rows.parquet")
    ours, stock = both(tokenizer_folder, tmp_path / "rows.parquet", pad_mode="no_padding")
    assert_equal_rows(ours, stock)
    assert ours[0]["loss_mask"].tolist() == [0] * 5 + [0] + [1] * 4
    assert ours[1]["loss_mask"].tolist() == [0] + [1] * 4 + [0] * 5


def test_still_refuses_a_template_that_renders_messages_differently_together(
    tokenizer_folder: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "model")
    tokenizer.chat_template += "{%- if messages | length > 1 -%}<|sid_end|>{%- endif -%}"
    config = OmegaConf.create({"max_length": 64})
    parquet = str(tokenizer_folder / "verl" / "sft.parquet")
    with pytest.raises(AssertionError):
        MultiTurnSFTDataset(parquet, tokenizer, config)[0]
    with pytest.raises(AssertionError):
        ItemSFTDataset(parquet, tokenizer, config)[0]
