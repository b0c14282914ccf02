"""verl's SFT dataset with a memory: an item's message is tokenised once, not once per row.

Same columns, same tokens, same loss mask as `MultiTurnSFTDataset`; only the repeated work is gone. A
history of 20 items costs the stock class 21 chat-template calls for every row of every epoch.
"""

from __future__ import annotations

from typing import Any

from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset


class ItemSFTDataset(MultiTurnSFTDataset):
    """Use with `data.custom_cls.path=pkg://verl_recast.sft_dataset data.custom_cls.name=ItemSFTDataset`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._tokens: dict[tuple[str, str, bool, bool | None], Any] = {}
        self._checked = False
        super().__init__(*args, **kwargs)

    def _process_single_message(
        self,
        index: int,
        message: dict[str, Any],
        full_message: list,
        tools: list[dict[str, Any]] | None = None,
        enable_thinking: bool | None = None,
    ) -> Any:
        if tools is not None:
            return super()._process_single_message(index, message, full_message, tools, enable_thinking)
        # The first message keeps a system prompt.
        key = (message["role"], message["content"], index == 0, enable_thinking)
        if key not in self._tokens:
            self._tokens[key] = super()._process_single_message(
                index, message, full_message, enable_thinking=enable_thinking
            )
        input_ids, loss_mask, attention_mask, inputs = self._tokens[key]
        return input_ids, loss_mask, attention_mask, dict(inputs)

    def sanity_check(self, input_ids: Any, messages: list, tools: Any, enable_thinking: Any) -> None:
        # One template renders every row: if message by message equals the whole once, it always does. A row
        # of one message proves nothing.
        if not self._checked:
            super().sanity_check(input_ids, messages, tools, enable_thinking)
            self._checked = len(messages) > 1
