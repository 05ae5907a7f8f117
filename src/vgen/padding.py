"""Completions as tensors of one size, as trainers build their batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class PaddedBatch(NamedTuple):
    """What `Completions.padded` returns: a row for each completion, prompts padded on the left and completions on the
    right, as TRL's trainers have them.

    `P` is the longest prompt, `C` the longest completion, in tokens.
    """

    prompt_ids: torch.Tensor
    """int64, rows × P."""
    completion_ids: torch.Tensor
    """int64, rows × C."""
    attention_mask: torch.Tensor
    """int64, rows × (P + C): 1 for the tokens of prompt and completion, 0 for padding."""
    completion_mask: torch.Tensor
    """int64, rows × C."""
    logprobs: torch.Tensor | None
    """float32, rows × C: the log-probability of each sampled token, 0 for padding, NaN where the engine's was NaN. None
    if no completion has log-probabilities."""

    @property
    def input_ids(self) -> torch.Tensor:
        """Prompts and completions together: int64, rows × (P + C)."""
        import torch

        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)


def padded(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    logprobs: Sequence[Sequence[float | None] | None],
    pad_token_id: int,
    device: Any,
) -> PaddedBatch:
    """Token ids of each row's prompt and completion, and the log-probabilities of the latter, as tensors."""
    import torch

    longest_prompt, longest = (max(map(len, rows), default=0) for rows in (prompts, completions))

    def tensor(rows: list[list[Any]], dtype: torch.dtype, width: int) -> torch.Tensor:
        return torch.tensor(rows, dtype=dtype).reshape(len(rows), width).to(device)

    left = [[pad_token_id] * (longest_prompt - len(prompt)) + prompt for prompt in prompts]
    right = [ids + [pad_token_id] * (longest - len(ids)) for ids in completions]
    prompt_mask = [[0] * (longest_prompt - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in completions]
    values = None
    if any(row is not None for row in logprobs):
        rows = [[None] * len(ids) if row is None else row for row, ids in zip(logprobs, completions, strict=True)]
        filled = [[math.nan if each is None else each for each in row] + [0.0] * (longest - len(row)) for row in rows]
        values = tensor(filled, torch.float32, longest)
    completion_mask = tensor(mask, torch.int64, longest)
    return PaddedBatch(
        tensor(left, torch.int64, longest_prompt),
        tensor(right, torch.int64, longest),
        torch.cat([tensor(prompt_mask, torch.int64, longest_prompt), completion_mask], dim=1),
        completion_mask,
        values,
    )
