"""The settings of one PPD engine: made in the front end, carried to every process.

They travel as JSON values in vLLM's own speculative configuration, which each worker
and the engine core receive. Nothing here is part of what keys compiled graphs, except
what `select` puts in ``additional_config`` besides.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.config import SpeculativeConfig
from vllm.config.utils import config

from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.bigram import BIGRAM_FILE, BigramTable, BigramTensors, OnlineBigram
from vllm_ppd.trees.menu import TreeMenu

# Where `select` puts what keys compiled graphs in vLLM's additional_config.
KEY = "ppd"
# A bigram table that starts empty: next tokens listed per token, and the weight of
# their gain beside prompt rows' logits, which calibration would have measured.
_EMPTY_ENTRIES, _EMPTY_WEIGHT = 16, 0.8


class ServedBigram(NamedTuple):
    """The bigram table of a worker; `online` is the same with its counts."""

    table: BigramTensors | None
    weights: tuple[float, ...]
    """[m] how much of its gain to add to prompt token d's logits."""
    online: OnlineBigram | None
    """None if it does not learn."""


@dataclass(frozen=True)
class ServingSettings:
    """What the processes of an engine have to know, as JSON values."""

    path: str | None
    """Folder of the prompt tokens; None where there are none."""
    num_prompt_tokens: int
    num_ept: int
    vocab_size: int
    device: str
    """"cpu" or "cuda"."""
    menu: dict[str, Any]
    """`TreeMenu.to_dict` of the menu that is served."""
    bigram: bool
    """The folder's bigram table is loaded."""
    learns_bigram: bool
    """The bigram table learns online, from empty where the folder has none."""
    ngram: bool
    """Earlier n-gram matches are drafted from."""
    adapts: bool
    """Draft lengths follow what is measured while serving."""
    profile: dict[str, Any] | None
    """`LatencyProfile.to_dict` of this machine; None where nothing is measured."""
    measure: bool
    """This start measures the machine before it serves."""
    measure_seconds: float
    """Time budget of that."""
    profile_key: dict[str, Any]
    """What the profile is filed under."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def tree_menu(self) -> TreeMenu:
        return TreeMenu.from_dict(self.menu)

    def latency_profile(self) -> LatencyProfile | None:
        return None if self.profile is None else LatencyProfile.from_dict(self.profile)

    def served_bigram(self, device: torch.device | str = "cpu") -> ServedBigram:
        """The folder's bigram table, or an empty one that will learn, or none.

        Raises:
            FormatError: a file that cannot be used.
        """
        m, vocab_size = self.num_prompt_tokens, self.vocab_size
        if self.bigram and self.path is not None:
            table = BigramTable.load(Path(self.path) / BIGRAM_FILE, vocab_size, m)
        elif self.learns_bigram:
            weights = (_EMPTY_WEIGHT,) * m
            table = BigramTable.empty(vocab_size, _EMPTY_ENTRIES, weights)
        else:
            return ServedBigram(None, (1.0,) * m, None)
        if not self.learns_bigram:
            return ServedBigram(BigramTensors.of(table, device), table.weights, None)
        online = OnlineBigram.of(table, device)
        return ServedBigram(online.table, table.weights, online)


@config
class PPDSpeculativeConfig(SpeculativeConfig):
    """vLLM's speculative settings with PPD's own beside them.

    On V2 the method is "ppd", which vLLM's list lacks: any name that vLLM does not
    know keeps it on the V2 runner and takes no special case in its scheduler. On V1
    it is vLLM's "custom_class".
    """

    method: str | None = KEY  # type: ignore[assignment]
    ppd: dict[str, Any] | None = None
    """`ServingSettings.to_dict`."""

    def __post_init__(self) -> None:
        # Where vLLM asks about a drafter, the target is the answer.
        self.draft_model_config = self.target_model_config
        self.draft_parallel_config = self.target_parallel_config

    def use_ngram(self) -> bool:
        # Asked by vLLM's V2 runner alone: whether all token ids shall be in device
        # memory, where n-gram matches are looked up, or in the host's.
        return self.ppd is not None and bool(self.ppd["ngram"])

    def __repr__(self) -> str:
        # vLLM logs its whole configuration; a menu is pages long.
        return f"SpeculativeConfig(method='ppd', drafts={self.num_speculative_tokens})"


def serving_settings(vllm_config: Any) -> ServingSettings:
    """PPD's settings of an engine that runs PPD."""
    return ServingSettings(**vllm_config.speculative_config.ppd)
