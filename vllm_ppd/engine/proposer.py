"""The object vLLM's ``custom_class`` method loads: PPD's weights go in here."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_ppd.engine.embedding import add_soft_tokens
from vllm_ppd.engine.selection import KEY
from vllm_ppd.prompts import PromptTokens
from vllm_ppd.tables import PolicyTables
from vllm_ppd.tree import TreePolicy


class PPDProposer:
    """Holds what the runner needs: the trees as tables, and the soft tokens' ids.

    The guesses themselves come from the runner, which has the hidden states that
    this interface does not pass on.
    """

    def __init__(self, vllm_config: VllmConfig):
        settings = vllm_config.additional_config[KEY]
        model = vllm_config.model_config
        self.vocab_size = model.get_vocab_size()
        self.prompts = PromptTokens.load(settings["path"])
        speculative = vllm_config.speculative_config
        assert speculative is not None
        self.tables = PolicyTables(
            TreePolicy.from_dict(settings["policy"]),
            first_soft_id=self.vocab_size,
            num_rows=1 + speculative.num_speculative_tokens,
        )

    def load_model(self, model: torch.nn.Module) -> None:
        """Called once the target is loaded, before it is compiled."""
        add_soft_tokens(model, self.prompts.rows, self.vocab_size)

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise NotImplementedError("PPD's guesses come from its model runner")
