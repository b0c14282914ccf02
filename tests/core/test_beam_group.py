"""Beams as groups: the answers of the beam search, the log-probs of plain forwards."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CODES, OFFSETS, PAD, PROMPTS, plain_log_probs, plain_trie_log_probs

from recast_cli.core.beam_group import beam_group
from recast_cli.core.beam_search import beam_search
from recast_cli.core.trie import Trie


@pytest.mark.parametrize("token_budget", [1, 1 << 14])
def test_beams_with_their_log_probs(model, trie: Trie, token_budget: int) -> None:
    closed = [[0, 5, 6], [], list(range(20)), [24]]  # the third has 5 items left
    options = {"pad_token_id": PAD, "exclusion": trie.exclusion(closed), "token_budget": token_budget}
    group = beam_group(model, trie, OFFSETS, PROMPTS, 8, **options)
    beams = beam_search(model, trie, OFFSETS, PROMPTS, 8, **options)
    assert torch.equal(group.codes_BGL, beams.codes_BWL) and torch.equal(group.items_BG, beams.items_BW)
    for row, prompt in enumerate(PROMPTS):
        open_codes = CODES[[item for item in range(len(CODES)) if item not in closed[row]]]
        for place, codes in enumerate(group.codes_BGL[row].tolist()):
            if row == 2 and place >= 5:
                assert codes == [-1] * 3
                assert group.log_probs_BGL[row, place].isnan().all()
                assert group.trie_log_probs_BGL[row, place].isnan().all()
                continue
            plain = plain_log_probs(model, prompt, codes)
            full = [float(plain[level, OFFSETS[level] + code]) for level, code in enumerate(codes)]
            among = plain_trie_log_probs(model, prompt, codes, open_codes)
            assert group.log_probs_BGL[row, place].tolist() == pytest.approx(full, abs=1e-5)
            assert group.trie_log_probs_BGL[row, place].tolist() == pytest.approx(among, abs=1e-5)


def test_more_beams_than_items_no_prompts_and_no_beams(model, trie: Trie) -> None:
    assert (beam_group(model, trie, OFFSETS, PROMPTS, 30, pad_token_id=PAD).items_BG[:, 25:] == -1).all()
    assert beam_group(model, trie, OFFSETS, [], 5, pad_token_id=PAD).items_BG.shape == (0, 5)
    with pytest.raises(ValueError, match="num_rollouts must be at least 1, found 0"):
        beam_group(model, trie, OFFSETS, PROMPTS, 0, pad_token_id=PAD)
