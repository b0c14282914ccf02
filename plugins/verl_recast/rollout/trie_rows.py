"""Which token may come next, for every row of an inference engine's batch that is writing a semantic ID.

Nothing of an engine is imported here: `vllm_trie.py` hands over the rows and their live lists of tokens.

Shapes: R rows of the batch, C rows of one call among them, L levels, K codes of a level, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from verl_recast.catalogue import Catalogue


@dataclass
class _Answer:
    """A request on its way through the trie.

    Attributes:
        given: Code tokens of the answer that its prompt holds already.
        output: The engine's own list of what it has generated; it grows, and may shrink, behind our back.
        ends: What is written after the last code, token by token; the last of them again and again.
        depth, node: Codes walked so far, and where they lead.
    """

    given: tuple[int, ...]
    output: list[int]
    ends: tuple[int, ...]
    depth: int = 0
    node: int = 0

    def __len__(self) -> int:
        return len(self.given) + len(self.output)

    def token(self, place: int) -> int:
        behind = place - len(self.given)
        return self.given[place] if behind < 0 else self.output[behind]


class TrieRows:
    """The rows of a batch that are writing a semantic ID, and the mask of each one's next token.

    A request is constrained if it says so, or if its prompt ends inside a semantic ID: with `<|sid_begin|>`,
    or with that and some codes. After the L-th code it may only write `<|sid_end|>`, and then the end token
    it was added with; a request for L tokens never comes to that.

    Args:
        catalogue: The trie and its token ids.
        device: Where the logits are.
    """

    def __init__(self, catalogue: Catalogue, device: torch.device | str) -> None:
        self.catalogue = catalogue
        # Tokens come as Python lists and are walked on the CPU; only the masks are made beside the logits.
        self.host_trie, self.trie = catalogue.trie.to("cpu"), catalogue.trie.to(device)
        self._answers: dict[int, _Answer] = {}

    def add(
        self,
        row: int,
        prompt: Sequence[int],
        output: list[int],
        end: int | None = None,
        *,
        num_given: int | None = None,
    ) -> None:
        """Put a request into a row, in place of any that is there.

        Args:
            prompt: Token ids.
            output: Generated tokens so far (more than none where the engine resumes a request); kept, and
                read anew before each mask.
            end: Token that ends the response (default: `<|sid_end|>` once more).
            num_given: So many tokens at the end of the prompt are codes of the answer; None asks the prompt.
        """
        self.drop(row)
        given = self._begun(prompt) if num_given is None else tuple(prompt[len(prompt) - num_given :])
        if given is not None:
            ends = tuple(token for token in (self.catalogue.sid_end, end) if token is not None)
            self._answers[row] = _Answer(given, output, ends)

    def drop(self, row: int) -> None:
        """Forget the request of a row, constrained or not."""
        self._answers.pop(row, None)

    def move(self, source: int, target: int, *, swap: bool) -> None:
        """Put the request of `source` into row `target`, and with `swap` the other one into `source`."""
        moved, other = self._answers.pop(source, None), self._answers.pop(target, None)
        if moved is not None:
            self._answers[target] = moved
        if swap and other is not None:
            self._answers[source] = other

    def mask_(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """Set to -inf, in place, all that the constrained rows may not write next.

        Raises:
            ValueError: a row has left the trie, or nothing that it may write has a finite logit.
        """
        self._advance()
        num_levels, device = self.trie.num_levels, logits_RV.device
        for level in range(num_levels):
            at = {row: answer for row, answer in self._answers.items() if answer.depth == level}
            if at:
                rows_C = torch.tensor(list(at), device=device)
                nodes_C = torch.tensor([answer.node for answer in at.values()], device=device)
                self._keep_children_(logits_RV, level, rows_C, nodes_C)
        closing = {
            row: _closing(row, answer.ends, len(answer) - num_levels)
            for row, answer in self._answers.items()
            if answer.depth == num_levels
        }
        if closing:
            rows_C = torch.tensor(list(closing), device=device)
            logits_RV[rows_C] = -torch.inf
            # The only choice: any finite logit will do, and the model's own may be masked (min_tokens).
            logits_RV[rows_C, torch.tensor(list(closing.values()), device=device)] = 0
        return logits_RV

    def _begun(self, prompt: Sequence[int]) -> tuple[int, ...] | None:
        """Code tokens after the last `<|sid_begin|>`; None where the prompt does not end inside an item."""
        tail = list(prompt[-(self.trie.num_levels + 1) :])[::-1]
        if self.catalogue.sid_begin not in tail:
            return None
        given = tuple(tail[: tail.index(self.catalogue.sid_begin)][::-1])
        return given if self._is_path(given) else None  # some other text, which is not ours to judge

    def _is_path(self, tokens: Sequence[int]) -> bool:
        node = torch.zeros(1, dtype=torch.int64)
        for level, token in enumerate(tokens):
            code = torch.tensor([token - self.catalogue.level_offsets[level]])
            node = self.host_trie.find(level, node, code)
        return int(node) >= 0

    def _advance(self) -> None:
        """Walk every row down the codes that came since the last mask, level by level, all rows at once."""
        for answer in self._answers.values():
            if len(answer) < answer.depth:  # the engine took tokens back
                answer.depth = answer.node = 0
        for level in range(self.trie.num_levels):
            due = {row: a for row, a in self._answers.items() if a.depth == level < len(a)}
            if not due:
                continue
            tokens_C = torch.tensor([answer.token(level) for answer in due.values()])
            nodes_C = torch.tensor([answer.node for answer in due.values()])
            children_C = self.host_trie.find(
                level, nodes_C, tokens_C - self.catalogue.level_offsets[level]
            ).tolist()
            for (row, answer), child in zip(due.items(), children_C, strict=True):
                if child < 0:
                    written = [answer.token(place) for place in range(level + 1)]
                    raise ValueError(f"row {row} of the batch wrote tokens {written}: no item begins so")
                answer.node, answer.depth = child, level + 1

    def _keep_children_(
        self, logits_RV: torch.Tensor, level: int, rows_C: torch.Tensor, nodes_C: torch.Tensor
    ) -> None:
        begin = self.catalogue.level_offsets[level]
        end = begin + self.trie.codebook_sizes[level]
        if end > logits_RV.shape[1]:
            raise ValueError(f"codes use token ids up to {end - 1}, the model has {logits_RV.shape[1]}")
        kept_CK = logits_RV[rows_C, begin:end].masked_fill_(~self.trie.mask(level, nodes_C), -torch.inf)
        is_finite_C = kept_CK.amax(dim=1).isfinite()
        if not bool(is_finite_C.all()):
            row = int(rows_C[~is_finite_C][0])
            raise ValueError(f"row {row} of the batch: no code that the catalogue allows has a finite logit")
        logits_RV[rows_C] = -torch.inf
        logits_RV[rows_C, begin:end] = kept_CK


def _closing(row: int, ends: tuple[int, ...], num_written: int) -> int:
    """The token that follows a whole semantic ID and `num_written` tokens behind it."""
    if not ends:
        raise ValueError(
            f"row {row} of the batch has written its item, and nothing may follow: the vocabulary has no "
            "<|sid_end|> and the request no end token; ask for as many tokens as there are levels"
        )
    return ends[min(num_written, len(ends) - 1)]
