"""The mask of an engine's batch against a plain loop over the catalogue, without any engine.

The reference knows neither trie nor state: it reads the tokens of a request and enumerates the items.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recast_cli.core.trie import Trie
from verl_recast.catalogue import Catalogue
from verl_recast.rollout.trie_rows import TrieRows

SIZES = (3, 4, 5)
OFFSETS = (10, 13, 17)
BEGIN, END, EOS, TEXT, VOCABULARY_SIZE = 1, 2, 3, 4, 24  # ids 22 and 23 are no tokens
ITEMS = [(0, 0, 0), (0, 0, 4), (0, 3, 1), (2, 1, 1), (2, 1, 2), (2, 2, 0)]  # code 1 of level 0 leads nowhere


def rows_of(items: list[tuple[int, ...]] = ITEMS, **marks: int | None) -> TrieRows:
    trie = Trie.from_codes(np.array(items), SIZES)
    tokens = {"sid_begin": BEGIN, "sid_end": END, **marks}
    return TrieRows(Catalogue(trie, OFFSETS, 0, frozenset(items), **tokens), "cpu")


def tokens(codes: tuple[int, ...]) -> list[int]:
    return [OFFSETS[level] + code for level, code in enumerate(codes)]


def allowed_slowly(
    items: list[tuple[int, ...]], prompt: list[int], output: list[int], eos: int | None
) -> set[int]:
    """What may follow, read off the last `<|sid_begin|>` and a list of all items."""
    text = prompt + output
    if BEGIN not in text or len(text) - 1 - text[::-1].index(BEGIN) < len(prompt) - 4:
        return set(range(VOCABULARY_SIZE))
    written = text[len(text) - text[::-1].index(BEGIN) :]
    if len(written) >= 3:
        return {END if len(written) == 3 or eos is None else eos}
    found = {tokens(item)[len(written)] for item in items if tokens(item)[: len(written)] == written}
    assert found, "the reference itself left the catalogue"
    return found


def masked(rows: TrieRows, num_rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(num_rows, VOCABULARY_SIZE, generator=torch.Generator().manual_seed(seed))
    return logits, rows.mask_(logits.clone())


def allowed(rows: TrieRows, num_rows: int) -> list[set[int]]:
    _, found = masked(rows, num_rows)
    return [set((row > -torch.inf).nonzero()[:, 0].tolist()) for row in found]


def test_one_request_from_the_root_to_the_end() -> None:
    rows, output = rows_of(), []
    rows.add(0, [TEXT, BEGIN], output, EOS)
    steps = [({10, 12}, 12), ({14, 15}, 14), ({18, 19}, 19), ({END}, END), ({EOS}, EOS), ({EOS}, EOS)]
    for expected, token in steps:
        assert allowed(rows, 1) == [expected]
        output.append(token)


def test_allowed_logits_keep_their_values_and_free_rows_all_of_them() -> None:
    rows = rows_of()
    rows.add(1, [BEGIN], [], EOS)
    rows.add(2, [TEXT], [], EOS)
    before, after = masked(rows, 3)
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert torch.equal(after[1, [10, 12]], before[1, [10, 12]])
    assert int((after[1] > -torch.inf).sum()) == 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([BEGIN, *tokens((2,))], {14, 15}),
        ([BEGIN, *tokens((0, 0))], {17, 21}),
        ([BEGIN, *tokens((0, 0, 4))], {END}),
        ([BEGIN, *tokens((0, 0, 4)), END], set(range(VOCABULARY_SIZE))),
        ([BEGIN, *tokens((0, 0, 4)), END, BEGIN], {10, 12}),
        ([BEGIN, *tokens((0, 0, 4)), END, BEGIN, 12], {14, 15}),
        ([], set(range(VOCABULARY_SIZE))),
        # text of a user, which is no item's beginning: not ours to judge
        ([BEGIN, TEXT], set(range(VOCABULARY_SIZE))),
        ([BEGIN, END], set(range(VOCABULARY_SIZE))),
        ([BEGIN, 11], set(range(VOCABULARY_SIZE))),
        ([BEGIN, 10, 14], set(range(VOCABULARY_SIZE))),
    ],
)
def test_prompt_that_ends_inside_an_item_goes_on_from_there(prompt: list[int], expected: set[int]) -> None:
    """As when verl aborts a request and asks again with what it had written."""
    rows, output = rows_of(), []
    rows.add(0, prompt, output, EOS)
    assert allowed(rows, 1) == [expected]
    if expected == {14, 15}:
        output.append(15)
        assert allowed(rows, 1) == [{17}]


def test_request_can_say_that_it_is_inside_an_item() -> None:
    """A vocabulary made elsewhere may have no marks round an item."""
    rows, output = rows_of(sid_begin=None, sid_end=None), []
    rows.add(0, [TEXT], output, EOS, num_given=0)
    rows.add(1, [TEXT, *tokens((2, 1))], [], EOS, num_given=2)
    rows.add(2, [BEGIN], [], EOS)
    assert allowed(rows, 3) == [{10, 12}, {18, 19}, set(range(VOCABULARY_SIZE))]
    output += tokens((0, 0, 4))
    for _ in range(2):
        assert allowed(rows, 3)[0] == {EOS}
        output.append(EOS)
    rows.add(0, [TEXT], tokens((0, 0, 4)), None, num_given=0)
    with pytest.raises(ValueError, match="row 0 of the batch has written its item, and nothing may follow"):
        allowed(rows, 3)


def test_requests_keep_their_place_in_the_trie_when_their_rows_change() -> None:
    rows, every = rows_of(), set(range(VOCABULARY_SIZE))
    rows.add(0, [BEGIN], [10], EOS)
    rows.add(1, [BEGIN], [12], EOS)
    rows.add(2, [TEXT], [], EOS)
    assert allowed(rows, 4) == [{13, 16}, {14, 15}, every, every]
    rows.move(0, 1, swap=True)
    assert allowed(rows, 4) == [{14, 15}, {13, 16}, every, every]
    rows.move(1, 2, swap=True)  # with one that is free
    assert allowed(rows, 4) == [{14, 15}, every, {13, 16}, every]
    rows.move(2, 3, swap=False)  # into an empty row
    assert allowed(rows, 4) == [{14, 15}, every, every, {13, 16}]
    rows.move(3, 0, swap=False)  # over another request
    assert allowed(rows, 4) == [{13, 16}, every, every, every]
    rows.move(1, 0, swap=False)  # a free one over a constrained one
    assert allowed(rows, 4) == [every, every, every, every]


def test_placeholder_is_read_only_once_the_engine_has_filled_it() -> None:
    rows, output = rows_of(), []
    rows.add(0, [BEGIN], output, EOS)
    assert allowed(rows, 1) == [{10, 12}]
    output.append(-1)
    output[:] = [10]
    assert allowed(rows, 1) == [{13, 16}]
    output.append(-1)
    with pytest.raises(ValueError, match=r"row 0 of the batch wrote tokens \[10, -1\]: no item begins so"):
        allowed(rows, 1)


def test_tokens_that_the_engine_takes_back_are_walked_back() -> None:
    rows, output = rows_of(), [10, 13]
    rows.add(0, [BEGIN], output, EOS)
    assert allowed(rows, 1) == [{17, 21}]
    del output[:]
    assert allowed(rows, 1) == [{10, 12}]
    output.append(12)
    assert allowed(rows, 1) == [{14, 15}]


@pytest.mark.parametrize("written", [[11], [10, 14], [TEXT], [12, 15, 18], [22]])
def test_token_outside_the_catalogue_is_an_error(written: list[int]) -> None:
    rows = rows_of()
    rows.add(4, [BEGIN], written, EOS)
    with pytest.raises(ValueError, match="row 4 of the batch wrote tokens"):
        rows.mask_(torch.zeros(5, VOCABULARY_SIZE))


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_no_finite_logit_among_the_children_is_an_error(value: float) -> None:
    """As when a request's own `allowed_token_ids` exclude them all, or the model is broken."""
    rows = rows_of()
    rows.add(1, [BEGIN], [], EOS)
    logits = torch.zeros(2, VOCABULARY_SIZE)
    logits[1, [10, 12]] = value
    with pytest.raises(ValueError, match=r"row 1 of the batch: no code .* has a finite logit"):
        rows.mask_(logits)


def test_end_is_possible_even_if_something_else_has_masked_it() -> None:
    rows = rows_of()
    rows.add(0, [BEGIN], tokens((0, 0, 0)), EOS)
    logits = torch.zeros(1, VOCABULARY_SIZE)
    logits[0, END] = -torch.inf  # `min_tokens` masks stop tokens
    assert rows.mask_(logits)[0].argmax() == END and logits[0, END].isfinite()


def test_model_with_fewer_tokens_than_codes_is_an_error() -> None:
    rows = rows_of()
    rows.add(0, [BEGIN], tokens((0, 0)), EOS)
    with pytest.raises(ValueError, match="codes use token ids up to 21, the model has 20"):
        rows.mask_(torch.zeros(1, 20))


@settings(max_examples=150)
@given(data=st.data())
def test_batches_that_grow_shrink_and_move_agree_with_the_plain_loop(data: st.DataObject) -> None:
    """Requests join, leave, are preempted and resumed, moved down and swapped, as vLLM does it."""
    every = [(a, b, c) for a in range(3) for b in range(4) for c in range(5)]
    items = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=12, unique=True))
    rows = rows_of(items)
    batch: list[tuple[list[int], list[int], int | None] | None] = [None] * 5  # prompt, output, end
    waiting: list[tuple[list[int], list[int], int | None]] = []
    for _ in range(data.draw(st.integers(1, 14))):
        row, other = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
        event = data.draw(st.sampled_from(["add", "resume", "preempt", "drop", "move", "swap", "write"]))
        if event == "add":
            item = data.draw(st.sampled_from(items))
            part = data.draw(st.integers(0, 3))
            prompts = [
                [TEXT],
                [TEXT, BEGIN],
                [BEGIN, *tokens(item)[:part]],
                [BEGIN, *tokens(item), END, BEGIN],
            ]
            batch[row] = (data.draw(st.sampled_from(prompts)), [], data.draw(st.sampled_from([EOS, None])))
            rows.add(row, *batch[row])
        elif event == "resume" and waiting:
            prompt, output, end = waiting.pop()
            batch[row] = (prompt, list(output), end)  # vLLM may hand over another list
            rows.add(row, *batch[row])
        elif event in ("preempt", "drop"):
            if event == "preempt" and batch[row] is not None:
                waiting.append(batch[row])
            batch[row] = None
            rows.drop(row)
        elif event == "move" and batch[row] is not None and row != other:
            batch[other], batch[row] = batch[row], None
            rows.move(row, other, swap=False)
        elif event == "swap" and row != other:
            batch[other], batch[row] = batch[row], batch[other]
            rows.move(row, other, swap=True)
        elif event == "write":
            for request in filter(None, batch):
                choices = allowed_slowly(items, *request)
                # A free request that writes the begin token is still free: only prompts ask for items.
                request[1].append(data.draw(st.sampled_from(sorted(choices - {BEGIN}))))
        expected = [
            set(range(VOCABULARY_SIZE)) if request is None else allowed_slowly(items, *request)
            for request in batch
        ]
        assert allowed(rows, 5) == expected
