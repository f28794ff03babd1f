"""A batch of training sequences with the insertion points of all its updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_ppd.train.data import TokenStream
from vllm_ppd.train.documents import DataError
from vllm_ppd.train.insertion import Insertion, sample_insertion
from vllm_ppd.train.seeds import mixed_seed
from vllm_ppd.train.settings import TrainSettings

__all__ = ["Batch"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences that run through the frozen model once."""

    ids: torch.Tensor
    """int64 [batch, T]."""
    insertions: tuple[Insertion, ...]
    """One per update, each drawn by itself."""

    @classmethod
    def draw(
        cls, stream: TokenStream, settings: TrainSettings, number: int, process: int
    ) -> Batch:
        """Batch `number` of `process`, on the CPU; the same at every call.

        Raises DataError when the text allows no insertion.
        """
        generator = torch.Generator().manual_seed(
            mixed_seed(settings.seed, number, process)
        )
        # In chats a whole batch may be the user's words; draw again then.
        for _ in range(100):
            ids, allowed = stream.windows(
                stream.random_starts(settings.batch_size, settings.length, generator),
                settings.length,
            )
            insertions = tuple(
                sample_insertion(
                    torch.ones_like(ids),
                    settings.points,
                    settings.num_prompt_tokens,
                    settings.num_ept,
                    generator,
                    allowed,
                )
                for _ in range(settings.updates)
            )
            # A sequence with any place for a point has one in every insertion.
            if bool(insertions[0].valid.any()):
                return cls(ids, insertions)
        raise DataError(
            f"no window of {settings.length} tokens has "
            f"{settings.num_prompt_tokens + 1} tokens of the assistant in a row; use "
            "data with longer answers"
        )

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(
            self.ids.to(device), tuple(part.to(device) for part in self.insertions)
        )
