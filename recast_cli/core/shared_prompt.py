"""Rows that share a prompt, read behind one copy of it.

The rows of a group are one prompt with a response each, and the prompt is most of every row. Here each
distinct prompt of a micro-batch stands once in one packed sequence: all prompts first, then all responses.
A response sees its prompt and itself, at the positions that it has in its own row, so every logit is that
of the row read alone. All layers but attention work on packed tokens and see no padding.

Shapes: B rows, N tokens of all rows, U distinct prompts, P tokens of a prompt, S tokens of all responses to a
prompt, T = packed tokens, K tokens whose logits are read, H heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from recast_cli.core.runs import runs


@dataclass(frozen=True)
class SharedPrompts:
    """Where the tokens of a micro-batch stand in its packed sequence.

    Attributes:
        source_T: Which of the N row tokens each packed token is.
        read_K: Packed place of the tokens whose logits are read: of each row the last of its prompt, then its
            response.
        target_K: Which of the N row tokens each of them is.
        prompts_UP: Packed places of each prompt, padded on the right with any.
        responses_US: Packed places of the responses to each prompt, padded likewise.
        visible_U1SA: What a response token sees of its prompt (P) and of the responses (S), A = P + S.
        back_T: Place of each packed token in `prompts_UP` and `responses_US`, flattened one after the other.
        is_even: No padding in either.
    """

    source_T: torch.Tensor
    read_K: torch.Tensor
    target_K: torch.Tensor
    prompts_UP: torch.Tensor
    responses_US: torch.Tensor
    visible_U1SA: torch.Tensor
    back_T: torch.Tensor
    is_even: bool

    def to(self, device: torch.device) -> SharedPrompts:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "is_even"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def rows_by_prompt(tokens_N: np.ndarray, lengths_B: np.ndarray, responses_B: np.ndarray) -> list[list[int]]:
    """Rows of each distinct prompt, in order of its first row; arguments as of `share_prompts`."""
    starts_B = np.cumsum(lengths_B) - lengths_B
    rows: dict[bytes, list[int]] = {}
    for row, (start, length) in enumerate(zip(starts_B, lengths_B - responses_B, strict=True)):
        rows.setdefault(tokens_N[start : start + length].tobytes(), []).append(row)
    return list(rows.values())


def share_prompts(tokens_N: np.ndarray, lengths_B: np.ndarray, responses_B: np.ndarray) -> SharedPrompts:
    """Lay out rows behind their distinct prompts.

    Args:
        tokens_N: Tokens of all rows, one row after the other; each is a prompt and its response.
        lengths_B: Tokens of each row.
        responses_B: Tokens of each response.

    Raises:
        ValueError: a row without a prompt.
    """
    prompt_lengths_B = lengths_B - responses_B
    if int(prompt_lengths_B.min()) < 1:
        row = int(prompt_lengths_B.argmin())
        raise ValueError(f"row {row} has {lengths_B[row]} tokens, {responses_B[row]} of them its response")
    starts_B = np.cumsum(lengths_B) - lengths_B
    ends_B = starts_B + lengths_B
    groups = rows_by_prompt(tokens_N, lengths_B, responses_B)
    first_U = np.array([rows[0] for rows in groups])
    order = np.concatenate(groups)
    source_T = np.concatenate(
        [
            runs(starts_B[first_U], prompt_lengths_B[first_U]),
            runs((ends_B - responses_B)[order], responses_B[order]),
        ]
    )
    # Packed places: where each prompt ends and begins, where each row's response begins.
    ends_U = np.cumsum(prompt_lengths_B[first_U])
    begins_U = ends_U - prompt_lengths_B[first_U]
    begins_B = np.empty_like(lengths_B)
    begins_B[order] = ends_U[-1] + np.cumsum(responses_B[order]) - responses_B[order]
    last_B = np.empty_like(lengths_B)
    last_B[order] = np.repeat(ends_U - 1, [len(rows) for rows in groups])
    # Of each row the last token of its prompt, then its response: the run from one place before the response,
    # whose first place is another one in the packed sequence.
    read_K = runs(begins_B - 1, responses_B + 1)
    read_K[np.cumsum(responses_B + 1) - (responses_B + 1)] = last_B
    target_K = runs(ends_B - responses_B - 1, responses_B + 1)

    prompts_UP, is_prompt_UP = _padded(begins_U, ends_U - begins_U)
    totals_U = np.array([responses_B[rows].sum() for rows in groups])
    responses_US, is_response_US = _padded(begins_B[first_U], totals_U)
    owner_US = np.full(responses_US.shape, -1)
    for u, rows in enumerate(groups):
        owner_US[u, : totals_U[u]] = np.repeat(rows, responses_B[rows])
    itself_USS = np.tril(owner_US[:, :, None] == owner_US[:, None, :])
    prompt_USP = np.broadcast_to(is_prompt_UP[:, None], (*responses_US.shape, prompts_UP.shape[1]))
    back_T = np.empty_like(source_T)
    back_T[prompts_UP[is_prompt_UP]] = np.flatnonzero(is_prompt_UP)
    back_T[responses_US[is_response_US]] = prompts_UP.size + np.flatnonzero(is_response_US)
    return SharedPrompts(
        source_T=torch.from_numpy(source_T),
        read_K=torch.from_numpy(read_K),
        target_K=torch.from_numpy(target_K),
        prompts_UP=torch.from_numpy(prompts_UP),
        responses_US=torch.from_numpy(responses_US),
        visible_U1SA=torch.from_numpy(np.concatenate([prompt_USP, itself_USS], axis=2))[:, None],
        back_T=torch.from_numpy(back_T),
        is_even=bool(is_prompt_UP.all() and is_response_US.all()),
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared: SharedPrompts,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of a packed sequence, in which a token sees what it would see in its own row.

    Args:
        query: (1, H, T, D); `key` and `value` may have fewer heads, a divisor of H.
        scale: Of the scores; 1 / sqrt(D) by default.

    Returns:
        (1, T, H, D).
    """
    options: dict[str, Any] = {"scale": scale, "enable_gqa": key.shape[1] != query.shape[1]}
    (asked_UHPD, asked_UHSD), (keys_UHPD, keys_UHSD), (values_UHPD, values_UHSD) = (
        _split(tensor, shared) for tensor in (query, key, value)
    )
    found_UHPD = scaled_dot_product_attention(asked_UHPD, keys_UHPD, values_UHPD, is_causal=True, **options)
    found_UHSD = scaled_dot_product_attention(
        asked_UHSD,
        torch.cat([keys_UHPD, keys_UHSD], dim=2),
        torch.cat([values_UHPD, values_UHSD], dim=2),
        attn_mask=shared.visible_U1SA,
        **options,
    )
    found_THD = torch.cat([found.transpose(1, 2).flatten(0, 1) for found in (found_UHPD, found_UHSD)])
    return (found_THD if shared.is_even else found_THD[shared.back_T])[None]


def _split(tensor: torch.Tensor, shared: SharedPrompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (U, H, P, D) and responses (U, H, S, D) of a packed (1, H, T, D)."""
    packed_THD = tensor[0].transpose(0, 1)
    if shared.is_even:
        parts = packed_THD.split([shared.prompts_UP.numel(), shared.responses_US.numel()])
        shapes = shared.prompts_UP.shape, shared.responses_US.shape
        prompts, responses = (part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True))
    else:
        prompts, responses = packed_THD[shared.prompts_UP], packed_THD[shared.responses_US]
    return prompts.transpose(1, 2), responses.transpose(1, 2)


def _padded(starts_U: np.ndarray, lengths_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive places from each start, padded on the right with place 0, and which are no padding."""
    steps = np.arange(int(lengths_U.max()))
    there = steps < lengths_U[:, None]
    return np.where(there, starts_U[:, None] + steps, 0), there
