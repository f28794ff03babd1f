"""The object vLLM's ``custom_class`` method loads: menu, bigram table, soft tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig

from vllm_ppd.engine.settings import serving_settings
from vllm_ppd.engine.soft_tokens import add_soft_tokens
from vllm_ppd.kernels.cpu.fill_tree import CpuTreeFiller
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import TreeMenu


class PPDProposer:
    """What the V1 runner drafts from.

    The runner makes the drafts itself: it has the hidden states that vLLM does not
    pass on through this interface.

    Attributes:
        menu: the trees that are served.
        tables: the same as arrays.
        fill: fills the trees of a batch with draft tokens.
        online_bigram: the bigram table with its counts; None if it does not learn.
        num_prompted_of: [S] the num_prompted that each tree is for.
    """

    def __init__(self, vllm_config: VllmConfig):
        self.settings = settings = serving_settings(vllm_config)
        speculative = vllm_config.speculative_config
        assert speculative is not None
        self.num_rows = 1 + speculative.num_speculative_tokens
        self.vocab_size = settings.vocab_size
        # Stands for the prompt rows' logits where no request has any.
        self.no_logits = torch.empty(0, self.vocab_size)
        self._bigram, self._weights, self.online_bigram = settings.served_bigram()
        self.set_menu(settings.tree_menu())

    def set_menu(self, menu: TreeMenu) -> None:
        """Serve other trees; no request may have drafts pending."""
        self.menu = menu
        self.tables = TreeTables(menu, self.vocab_size, self.num_rows)
        self.fill = CpuTreeFiller(self.tables, self._bigram, self._weights).run
        size = menu.num_prompt_tokens + 1
        self.num_prompted_of = (np.arange(len(menu.trees)) - 1) % size
        self.num_prompted_of[0] = 0

    def load_model(self, model: torch.nn.Module) -> None:
        """Called once the target is loaded, before it is compiled."""
        add_soft_tokens(model, self.settings.path, self.vocab_size)

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise NotImplementedError("PPD's drafts come from its model runner")
