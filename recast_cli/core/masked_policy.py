"""The policy renormalised over the catalogue: logits of codes that may not follow are put out of reach.

Rollouts are drawn from this policy, an actor that takes its log-probs after `mask_answers` optimises it.

Shapes: T positions, V vocabulary, R answers, L levels, K codes of a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recast_cli.core.trie import Trie

# Finite, because an entropy multiplies it by its probability 0. Its exp is 0 next to any logit of a model,
# and it stays finite divided by a temperature of 0.01.
OUT_OF_REACH = -1e30


def mask_answers(
    logits_TV: torch.Tensor,
    trie: Trie,
    level_offsets: Sequence[int],
    first_R: torch.Tensor,
    codes_RL: torch.Tensor,
) -> None:
    """Mask, in place, the logits that spell answers: all but the codes that the trie has there.

    The masked logits get no gradient. Positions that spell no answer are left alone.

    Args:
        logits_TV: float32 or bfloat16; any tensor that autograd lets be written to.
        trie: On the device of the logits.
        level_offsets: Token id of code 0 of each level.
        first_R: Position whose logits give code 0 of each answer; code l is l positions further.
        codes_RL: The answers.

    Raises:
        ValueError: an answer that is no item, or logits of a type that cannot hold `OUT_OF_REACH`.
    """
    if torch.finfo(logits_TV.dtype).min > OUT_OF_REACH:
        raise ValueError(f"logits are {logits_TV.dtype}, needed float32 or bfloat16")
    strange_R = trie.lookup(codes_RL) < 0
    if bool(strange_R.any()):
        answer = tuple(codes_RL[strange_R][0].tolist())
        raise ValueError(
            f"answer {answer} is no item of the catalogue, and its log-prob under the mask is -inf"
        )
    nodes_R = torch.zeros_like(first_R)
    for level, (offset, size) in enumerate(zip(level_offsets, trie.codebook_sizes, strict=True)):
        codes = slice(offset, offset + size)
        rows_R = first_R + level
        masked_RV = logits_TV.new_full((len(rows_R), logits_TV.shape[1]), OUT_OF_REACH)
        allowed_RK = trie.mask(level, nodes_R)
        masked_RV[:, codes] = logits_TV[rows_R, codes].masked_fill(~allowed_RK, OUT_OF_REACH)
        logits_TV[rows_R] = masked_RV
        nodes_R = trie.find(level, nodes_R, codes_RL[:, level])
