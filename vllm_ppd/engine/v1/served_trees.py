"""The object vLLM's ``custom_class`` method loads: PPD's weights go in here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig

from vllm_ppd.engine.known_profile import known_profile
from vllm_ppd.engine.select import KEY
from vllm_ppd.engine.soft_tokens import add_soft_tokens
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.plan_choice import PlanSettings
from vllm_ppd.search.latency import default_profile
from vllm_ppd.trees.bigram_learning import OnlineBigram
from vllm_ppd.trees.drafting import DraftInputs, BigramTensors, fill_trees
from vllm_ppd.trees.layout import TreeTables
from vllm_ppd.trees.menu import TreePlan

# Steps between looks at how long requests are.
_LENGTHS_EVERY = 8


class PPDProposer:
    """Holds what the runner needs: trees as tables, the bigram table, soft tokens.

    The guesses themselves come from the runner, which has the hidden states that
    this interface does not pass on.
    """

    def __init__(self, vllm_config: VllmConfig):
        settings = vllm_config.additional_config[KEY]
        self.plan_settings = PlanSettings(**settings["plan"])
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        self.prompts = PromptTokens.load(self.plan_settings.path)
        speculative = vllm_config.speculative_config
        assert speculative is not None
        self.num_rows = 1 + speculative.num_speculative_tokens
        self.device = torch.device(vllm_config.device_config.device)
        # Stands for the prompt rows' logits where no request has any.
        self.no_logits = torch.empty(0, self.vocab_size, device=self.device)
        self._load_bigram(settings["learn_bigrams"])
        self.profile_key = settings["profile_key"]
        profile = known_profile(settings["profile"], self.profile_key)
        self.profile = profile or default_profile(self.plan_settings.device)
        self.online = settings["online"] and self.plan_settings.tree is None
        # Whether this start still has to measure the machine.
        self.wants_profile = (
            settings["profile"] == "auto"
            and profile is None
            and self.plan_settings.tree is None
        )
        # Mean tokens of the requests that run, and how many those were.
        self.context, self._running = 1, 0
        self._lengths_left = 0
        self.set_plan(self.plan_settings.choose(profile)[0])

    def _load_bigram(self, learn: bool) -> None:
        table = self.plan_settings.bigram(self.vocab_size, learn)
        none = (1.0,) * self.prompts.num_prompt_tokens
        self.weights = table.weights if table is not None else none
        self.online_bigram = None
        if table is not None and learn:
            self.online_bigram = OnlineBigram.of(table, self.device)
            if self.device.type == "cpu":
                table = self.online_bigram.as_table(table)
        self.bigram = table

    def set_plan(self, plan: TreePlan) -> None:
        """Serve other trees; no request may have guesses pending."""
        self.plan, self._load, self._first_tree = plan, (0, 0), 0
        self.num_states = self.prompts.num_prompt_tokens + 1
        self.num_classes = plan.num_classes
        self.tables = TreeTables(plan, self.vocab_size, self.num_rows)
        # [S] match class and state that each tree is for.
        tree = np.arange(len(plan.trees)) - 1
        self.tree_states = np.maximum(tree % self.num_states, 0)
        self.tree_classes = np.maximum(tree // self.num_states % self.num_classes, 0)
        self.tree_states[0] = self.tree_classes[0] = 0
        if self.device.type == "cpu":
            from vllm_ppd.kernels.cpu import CpuTreeFiller

            filler = CpuTreeFiller(self.tables, self.bigram, self.weights)
            self.fill = filler.run
            return
        bigram, weights = None, self.weights
        if self.online_bigram is not None:
            bigram = self.online_bigram.table
        elif self.bigram is not None:
            bigram = BigramTensors.of(self.bigram, self.device)

        def fill(trees: np.ndarray, guesses: DraftInputs) -> np.ndarray:
            return fill_trees(self.tables, trees, guesses, bigram, np.array(weights))

        self.fill = fill

    def note_lengths(self, lengths: np.ndarray, new: int) -> None:
        """Know how long requests are in the mean, which is looked at now and then: the
        same ones grow by a token or two a step.

        Args:
            lengths: [B] their tokens.
            new: how many of them began with this step.
        """
        self._lengths_left -= 1
        if new or len(lengths) != self._running or self._lengths_left <= 0:
            self._running, self._lengths_left = len(lengths), _LENGTHS_EVERY
            self.context = int(lengths.sum()) // self._running

    def first_tree(self, running: int) -> int:
        """Tree id of match class 0, state 0 at this load; 0 to not speculate.

        Asked several times a step, mostly as before.
        """
        load = running, self.context
        if load != self._load:
            self._load = load
            self._first_tree = self.plan.first_trees[self.plan.tier_index(*load)]
        return self._first_tree

    def padded_tree(self, running: int) -> int:
        """Tree id for rows that were scheduled before anything could be guessed."""
        first = self.first_tree(running)
        return first if self.tables.num_nodes[first] == 1 else 0

    def load_model(self, model: torch.nn.Module) -> None:
        """Called once the target is loaded, before it is compiled."""
        add_soft_tokens(model, self.prompts.rows, self.vocab_size)

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise NotImplementedError("PPD's guesses come from its model runner")
