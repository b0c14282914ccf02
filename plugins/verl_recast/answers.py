"""The semantic ID inside a response, by token id: where it stands, and the anchor that takes its place."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from recast_cli.core.spelling import LEVELS
from recast_cli.vocabulary import code_ids


@dataclass(frozen=True)
class Answers:
    """What the N responses of a step hold.

    Attributes:
        starts_N: Where each one's last semantic ID starts, -1 without one.
        codes_NL: Codes of each one's last semantic ID, -1 without one.
        valid_N: True where there is one, of the catalogue if that is known.
        lends_N: True where an anchor may take the response's place and keep what stands round its semantic
            ID. A response without one can lend only where answers are bare codes, which need nothing round
            them: no response of the step has text before its semantic ID, and this one is too short for a
            thought that broke off (see docs/concepts/method.md).
    """

    starts_N: np.ndarray
    codes_NL: np.ndarray
    valid_N: np.ndarray
    lends_N: np.ndarray

    def sum_over_codes(self, values: Sequence[Sequence[float]]) -> np.ndarray:
        """Sum of a value per response token over the tokens of the semantic ID, NaN without one. (N,)"""
        num_levels = self.codes_NL.shape[1]
        sums = [
            sum(row[start : start + num_levels]) if start >= 0 else np.nan
            for row, start in zip(values, self.starts_N.tolist(), strict=True)
        ]
        return np.array(sums, dtype=np.float64)


class AnswerReader:
    """Finds semantic IDs of `num_levels` codes in token ids.

    Args:
        tokenizer: Has one token for each code (`<s_a_0>`, `<s_a_1>`, ..., or `<a_0>`, `<a_1>`, ...).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.code_ids = code_ids(tokenizer)
        # One place more than there are tokens: every id beyond (a padded vocabulary) reads as no code.
        self.level_V, self.code_V = np.full((2, max(tokenizer.get_vocab().values()) + 2), -1, dtype=np.int64)
        for (level, code), place in self.code_ids.items():
            self.level_V[place], self.code_V[place] = level, code

    def _places(self, ids: Sequence[int]) -> np.ndarray:
        return np.minimum(np.asarray(ids, dtype=np.int64), len(self.level_V) - 1)

    def target(self, codes: Sequence[int]) -> list[int]:
        """Token ids of the codes of a target.

        Raises:
            ValueError: the vocabulary has no token for one of them.
        """
        for level, code in enumerate(codes):
            if (level, code) not in self.code_ids:
                letter = LEVELS[level]
                raise ValueError(
                    f"target {tuple(codes)}: the model's tokenizer has no token for its code {code} of level "
                    f"{letter}, needed <s_{letter}_{code}> or <{letter}_{code}>: add the code tokens to its "
                    "vocabulary"
                )
        return [self.code_ids[place] for place in enumerate(codes)]

    def find(self, response: Sequence[int], num_levels: int) -> int:
        """Where the last semantic ID of a response starts, -1 if it holds none.

        A run of more or fewer codes than `num_levels` is none, as for the reward (`spelling.find_all`).
        """
        levels = self.level_V[self._places(response)]
        for start in np.flatnonzero(levels == 0)[::-1].tolist():
            run = levels[start : start + num_levels + 1].tolist()
            if run[:num_levels] == list(range(num_levels)) and run[num_levels:] != [num_levels]:
                return start
        return -1

    def read(
        self, responses: Sequence[Sequence[int]], num_levels: int, members: Set[tuple[int, ...]] | None = None
    ) -> Answers:
        """Semantic IDs of the responses of a step.

        Args:
            members: Every semantic ID of the catalogue, where it is known.
        """
        starts = np.array([self.find(response, num_levels) for response in responses])
        codes_NL = np.full((len(responses), num_levels), -1, dtype=np.int64)
        for row in np.flatnonzero(starts >= 0).tolist():
            ids = responses[row][starts[row] : starts[row] + num_levels]
            codes_NL[row] = self.code_V[self._places(ids)]
        known_N = np.array([members is None or tuple(codes) in members for codes in codes_NL.tolist()])
        # L codes, and at most `<|sid_end|>` and an end token
        bare_N = np.array([len(response) <= num_levels + 2 for response in responses]) & (starts.max() <= 0)
        return Answers(starts, codes_NL, (starts >= 0) & known_N, (starts >= 0) | bare_N)

    def anchor(self, response: Sequence[int], target: Sequence[int]) -> list[int]:
        """Token ids of the anchor: the replaced rollout with its last semantic ID swapped for the target's.

        What stands round it stays: a thought before it, and the end token, without which the negative's
        would be pushed down alone, step after step. A rollout without a semantic ID lends its end token only
        (see `Answers.lends_N`).
        """
        ids = self.target(target)
        start = self.find(response, len(ids))
        if start >= 0:
            return [*response[:start], *ids, *response[start + len(ids) :]]
        return [*ids, *(token for token in response[-1:] if token == self.tokenizer.eos_token_id)]
