"""Prompts and verl files, read back through a real tokenizer and verl's own data sets.

One tiny tokenizer: begin, end, pad and 3 x 8 codes as ordinary added tokens. L = 3 codes an item.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sealing import reseal

from recast_cli.artifacts import load_manifest
from recast_cli.data.prepare import Params, prepare
from recast_cli.data.prompts import CHAT_TEMPLATE, SID_BEGIN, SID_END, build_messages, code_text
from recast_cli.data.render import SPLITS, check_index, read_semantic_ids, render
from recast_cli.data.source import Source
from recast_cli.errors import ArtifactError, DataError

NUM_ITEMS = 12
SIDS = {f"i{n}": f"{SID_BEGIN}<s_a_{n % 8}><s_b_{n // 8}><s_c_{n % 3}>{SID_END}" for n in range(NUM_ITEMS)}
BEGIN, END, PAD = 0, 1, 2


def token_ids(item: str) -> list[int]:
    """The codes of an item as token ids, worked out by hand: 3 special places, then 8 codes a level."""
    n = int(item[1:])
    return [3 + n % 8, 3 + 8 + n // 8, 3 + 16 + n % 3]


def whole(items: list[str]) -> list[int]:
    return [token for item in items for token in (BEGIN, *token_ids(item), END)]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({SID_BEGIN: BEGIN, SID_END: END, "<|pad|>": PAD}, unk_token="<|pad|>"))
    codes = [f"<s_{level}_{code}>" for level in "abc" for code in range(8)]
    inner.add_tokens([AddedToken(text, normalized=False) for text in (SID_BEGIN, SID_END, "<|pad|>", *codes)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token=SID_END)
    made.chat_template = CHAT_TEMPLATE
    assert made.convert_tokens_to_ids(["<s_a_0>", "<s_b_0>", "<s_c_7>"]) == [3, 11, 26]
    return made


@pytest.fixture(params=["sft", "held-out"])
def rendered(
    request: pytest.FixtureRequest, make_source: Callable[..., Source], tmp_path: Path
) -> tuple[Path, Path]:
    """Dataset and verl folder: three users of 3, 9 and 21 events, history 4."""
    events = [(f"u{n}", f"i{t * 5 % NUM_ITEMS}", float(t)) for n in (3, 9, 21) for t in range(n)]
    data, verl = tmp_path / "data", tmp_path / "verl"
    prepare(make_source(events), Params(history=4, rl_rows=request.param), data)
    counts = render(data, SIDS, verl)
    assert counts == {name: pq.read_table(verl / f"{name}.parquet").num_rows for name in ("sft", *SPLITS)}
    return data, verl


def test_messages_by_hand() -> None:
    assert build_messages([SIDS["i1"], SIDS["i9"]], learn_from=1) == [
        {"role": "user", "content": "<s_a_1><s_b_0><s_c_1>"},
        {"role": "assistant", "content": "<s_a_1><s_b_1><s_c_0>"},
    ]
    assert [message["role"] for message in build_messages([SIDS["i1"]] * 3)] == ["user"] * 3
    assert [message["role"] for message in build_messages([SIDS["i1"]] * 3, learn_from=0)] == [
        "assistant"
    ] * 3


@pytest.mark.parametrize(
    "sid",
    [
        "",
        "<s_a_1><s_b_7>",
        f"{SID_BEGIN}{SID_END}",
        f"{SID_BEGIN}<s_b_1><s_a_1>{SID_END}",
        f"{SID_BEGIN}<s_a_1><s_c_1>{SID_END}",
        f"{SID_BEGIN}<s_a_1><s_a_1>{SID_END}",
        f"{SID_BEGIN}<s_a_x>{SID_END}",
        f"{SID_BEGIN}<s_a_1>{SID_END} ",
    ],
)
def test_misspelt_semantic_ids(sid: str) -> None:
    with pytest.raises(DataError, match="is not a semantic ID"):
        code_text(sid)


def test_template_by_hand(tokenizer: Any) -> None:
    messages = build_messages([SIDS["i1"], SIDS["i9"]], learn_from=1)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == [BEGIN, 4, 11, 20, END, BEGIN, 4, 12, 19, END, BEGIN]
    # codes are ordinary tokens: a reward that skips special tokens still sees them
    assert "<s_a_1>" in tokenizer.decode(ids, skip_special_tokens=True)


def test_rl_prompts_are_token_prefixes_of_sft_windows(rendered: tuple[Path, Path], tokenizer: Any) -> None:
    data, verl = rendered

    def encode(messages: list[dict[str, str]], prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)

    windows = pl.read_parquet(data / "sft.parquet").rows(named=True)
    messages = pq.read_table(verl / "sft.parquet")["messages"].to_pylist()
    window_ids = [encode(chat, False) for chat in messages]
    held_out = load_manifest(data, "dataset")["params"]["rl_rows"] == "held-out"
    place = dict.fromkeys(("u3", "u9", "u21"), 0)
    home: dict[tuple[str, int], list[int]] = {}
    for window, ids, chat in zip(windows, window_ids, messages, strict=True):
        assert ids == whole(window["items"])
        learned = [message["role"] == "assistant" for message in chat]
        assert learned == [n >= window["learn_from"] for n in range(len(window["items"]))]
        for _ in range(window["learn_from"], len(window["items"])):
            home[window["user_id"], place[window["user_id"]]] = ids
            place[window["user_id"]] += 1
    targets = pl.read_parquet(data / "rl.parquet").rows(named=True)
    rows = pq.read_table(verl / "rl.parquet").to_pylist()
    assert len(rows) == {False: (0 + 6 + 18), True: (0 + 1 + 1)}[held_out]
    for target, row in zip(targets, rows, strict=True):
        prompt = encode(row["prompt"], True)
        assert prompt == [*whole(target["history"]), BEGIN]
        if held_out:  # SFT never learned it
            assert (target["user_id"], target["position"]) not in home
            continue
        window = home[target["user_id"], target["position"]]
        answer = token_ids(target["target"])
        assert window[: len(prompt) + len(answer) + 1] == [*prompt, *answer, END]


def test_rows_carry_their_own_target_and_index(rendered: tuple[Path, Path]) -> None:
    data, verl = rendered
    seen = set()
    for split in SPLITS:
        targets = pl.read_parquet(data / f"{split}.parquet").rows(named=True)
        for target, row in zip(targets, pq.read_table(verl / f"{split}.parquet").to_pylist(), strict=True):
            assert list(row) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
            assert (row["data_source"], row["ability"]) == ("toy", "recommendation")
            assert row["reward_model"] == {
                "style": "rule",
                "ground_truth": SIDS[target["target"]].removeprefix(SID_BEGIN).removesuffix(SID_END),
            }
            assert row["extra_info"] == {
                "index": target["index"],
                "user_id": target["user_id"],
                "target_item_id": target["target"],
                "split": split,
            }
            seen.add(row["extra_info"]["index"])
    assert len(seen) == sum(pq.read_table(verl / f"{split}.parquet").num_rows for split in SPLITS)


@pytest.mark.slow
def test_stock_verl_learns_exactly_the_codes_and_end_of_learned_items(
    rendered: tuple[Path, Path], tokenizer: Any
) -> None:
    from omegaconf import OmegaConf
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    data, verl = rendered
    config = OmegaConf.create({"max_length": 64, "pad_mode": "right", "truncation": "error"})
    dataset = MultiTurnSFTDataset(str(verl / "sft.parquet"), tokenizer, config)
    windows = pl.read_parquet(data / "sft.parquet").rows(named=True)
    assert len(dataset) == len(windows)
    num_learned = 0
    for row, window in zip((dataset[n] for n in range(len(dataset))), windows, strict=True):
        num_tokens = 5 * len(window["items"])
        assert row["input_ids"][:num_tokens].tolist() == whole(window["items"])
        expected = [0, 0, 0, 0, 0] * window["learn_from"]
        expected += [0, 1, 1, 1, 1] * (len(window["items"]) - window["learn_from"])
        assert row["loss_mask"].tolist() == expected + [0] * (64 - num_tokens)
        num_learned += sum(expected) // 4
    rows = pl.read_parquet(data / "rl.parquet")
    # mode sft: RL sees every learned position but each user's first; held-out: 1 of u9's 7, 1 of u21's 19
    assert num_learned == (rows.height + 3 if rows.height > 2 else 1 + 6 + 18)


@pytest.mark.slow
def test_stock_verl_reads_the_rl_rows(rendered: tuple[Path, Path], tokenizer: Any, tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    _, verl = rendered
    config = OmegaConf.create(
        {"max_prompt_length": 5 * 4 + 1, "cache_dir": str(tmp_path), "filter_overlong_prompts_workers": 1}
    )
    for split in SPLITS:
        rows = pq.read_table(verl / f"{split}.parquet").to_pylist()
        dataset = RLHFDataset(str(verl / f"{split}.parquet"), tokenizer, config)
        assert len(dataset) == len(rows), "a prompt is longer than history * (L + 2) + 1 tokens"
        for n, row in enumerate(rows):
            assert dataset[n]["raw_prompt"] == row["prompt"]
            assert dataset[n]["index"] == row["extra_info"]["index"]
            assert dataset[n]["reward_model"] == row["reward_model"]


def test_missing_and_duplicate_index(rendered: tuple[Path, Path], tmp_path: Path) -> None:
    check_index({"rl": [0, 1], "validation": [2], "test": []})
    with pytest.raises(DataError, match=r"test.parquet row 1 has index 1, already in rl.parquet row 0"):
        check_index({"rl": [1, 2], "test": [3, 1]})
    with pytest.raises(DataError, match=r"rl.parquet row 1 has no index"):
        check_index({"rl": [1, None]})
    data, _ = rendered
    table = pq.read_table(data / "test.parquet")
    missing = pa.nulls(table.num_rows, pa.int64())
    taken = pq.read_table(data / "validation.parquet")["index"]
    for column in (missing, taken):
        pq.write_table(table.set_column(0, "index", column), data / "test.parquet")
        reseal(data)
        with pytest.raises(DataError, match=r"test.parquet row 0 has"):
            render(data, SIDS, tmp_path / "again")
        assert not (tmp_path / "again").exists()


def test_semantic_ids_from_parquet_and_folder(rendered: tuple[Path, Path], tmp_path: Path) -> None:
    data, verl = rendered
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    table = pa.table({"item_id": list(SIDS), "sid": list(SIDS.values())})
    pq.write_table(table, folder / "semantic_ids.parquet")
    for given in (folder, folder / "semantic_ids.parquet"):
        render(data, given, tmp_path / "again")
        for name in ("sft", *SPLITS):
            assert (tmp_path / "again" / f"{name}.parquet").read_bytes() == (
                verl / f"{name}.parquet"
            ).read_bytes()
    pq.write_table(table.rename_columns(["item", "sid"]), folder / "semantic_ids.parquet")
    with pytest.raises(ArtifactError, match="has columns item, sid, needed item_id, sid"):
        render(data, folder, tmp_path / "again")
    with pytest.raises(ArtifactError, match="does not exist"):
        render(data, tmp_path / "nowhere", tmp_path / "again")


def test_semantic_ids_that_do_not_fit(rendered: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = rendered
    fewer = {item: sid for item, sid in SIDS.items() if item != "i3"}
    with pytest.raises(ArtifactError, match=r"cover 11 items, this dataset has 12, item 'i3' has none"):
        render(data, fewer, tmp_path / "v")
    with pytest.raises(ArtifactError, match="cover 13 items, this dataset has 12"):
        render(data, SIDS | {"x": f"{SID_BEGIN}<s_a_7><s_b_7><s_c_7>{SID_END}"}, tmp_path / "v")
    with pytest.raises(DataError, match="items 'i1' and 'i2' share"):
        read_semantic_ids(SIDS | {"i2": SIDS["i1"]})
    with pytest.raises(DataError, match="item 'i2' has 2 codes, needed 3"):
        read_semantic_ids(SIDS | {"i2": f"{SID_BEGIN}<s_a_7><s_b_7>{SID_END}"})
