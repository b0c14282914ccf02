"""The tokens of semantic IDs, added to a Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recast_cli.core.spelling import SID_BEGIN, SID_END, code_token
from recast_cli.errors import ArtifactError
from recast_cli.vocabulary import Vocabulary


def semantic_id_tokens(codebook_sizes: Sequence[int]) -> list[str]:
    """All tokens of the semantic IDs in the order of their ids."""
    codes = [code_token(level, code) for level, size in enumerate(codebook_sizes) for code in range(size)]
    return [SID_BEGIN, SID_END, *codes]


def add_semantic_ids(
    tokenizer: Any, codebook_sizes: Sequence[int], *, embedding_rows: int | None = None
) -> Vocabulary:
    """Add the tokens of the semantic IDs to a tokenizer, in place.

    They are ordinary added tokens: special ones would vanish when an answer is decoded with
    `skip_special_tokens=True`. Tokens the tokenizer already has (an OpenOneRec model) keep their ids.

    Args:
        tokenizer: Of Hugging Face, with a pad token.
        embedding_rows: Rows of the model that goes with it; default as many as there are ids, afterwards at
            least so.

    Raises:
        ArtifactError: codes the tokenizer already has do not lie one behind the other.
    """
    from tokenizers import AddedToken

    tokens = semantic_id_tokens(codebook_sizes)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    ids = tokenizer.convert_tokens_to_ids(tokens)
    sid_begin, sid_end, rest = ids[0], ids[1], ids[2:]
    offsets = []
    for level, size in enumerate(codebook_sizes):
        level_ids, rest = rest[:size], rest[size:]
        if level_ids != list(range(level_ids[0], level_ids[0] + size)):
            raise ArtifactError(
                f"the base model already has some of the tokens {code_token(level, 0)} to "
                f"{code_token(level, size - 1)}, not one behind the other",
                "use a base model without semantic IDs, or --codebook-size no larger than its own",
            )
        offsets.append(level_ids[0])
    assert tokenizer.pad_token_id is not None, "the tokenizer has a pad token"
    return Vocabulary(
        sid_begin=sid_begin,
        sid_end=sid_end,
        pad=tokenizer.pad_token_id,
        level_offsets=tuple(offsets),
        codebook_sizes=tuple(codebook_sizes),
        num_levels=len(codebook_sizes),
        vocab_size=len(tokenizer),
        embedding_rows=max(len(tokenizer), embedding_rows or 0),
    )
