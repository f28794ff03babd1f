"""The search for tree menus: the few policies among which an engine chooses.

The best trees depend on the price of a row, and that depends on machine and load. For
each price between 0.001 and 0.2 plain steps, one of about ten policies is within 1 % of
the best one, so a menu is searched for once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import (
    LatencyCurve,
    LatencyProfile,
    expected_speedup,
    step_ratio,
)
from vllm_ppd.search.policy_iteration import SearchedPolicy, best_policy, policy_value
from vllm_ppd.trees.menu import MENU_FILE, TreeMenu, load_menus
from vllm_ppd.trees.tree import TreeError

# What one more row costs, in plain steps of one row.
ROW_PRICES = tuple(np.geomspace(0.0008, 0.8, 12))
# Rows of a step where every request has as many.
ROW_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# An entry is worth its place if it is so much faster at its row price than the others.
_LEAST_GAIN = 1.005
# An engine starts with drafts if they promise so much over plain decoding: promises are
# of one temperature, and err by a few per cent even there.
_LEAST_SPEEDUP = 1.25


def build_menu(
    model: AcceptanceModel, max_rows: int, num_ept: int = 1, fixed_rows: bool = False
) -> TreeMenu:
    """The menu of the best policies.

    Args:
        model: acceptance probabilities.
        max_rows: most rows of a request's step, root included, at least 2.
        num_ept: rows per prompt token.
        fixed_rows: every tree of an entry is padded to the entry's rows, so that an
            entry is the policy with the most tokens per step within them; otherwise an
            entry is the policy with the most tokens per second at one row price.
    """
    if fixed_rows:
        policies = _by_row_count(model, max_rows, num_ept)
    else:
        policies = _by_row_price(model, max_rows, num_ept)
    if not policies:
        # Nothing pays at any price: the smallest tree that can be drafted for.
        constant = LatencyCurve.constant()
        policies = [best_policy(model, constant, 1 + num_ept, num_ept)]
    entries = [policy.entry() for policy in policies]
    if fixed_rows:
        entries = [replace(e, row_shares=((e.max_rows, 1.0),)) for e in entries]
    return TreeMenu(tuple(entries))


def _by_row_count(
    model: AcceptanceModel, max_rows: int, num_ept: int
) -> list[SearchedPolicy]:
    """By rising rows, those that accept more than the one before."""
    policies: list[SearchedPolicy] = []
    for count in sorted({n for n in ROW_COUNTS if n < max_rows} | {max_rows}):
        policy = best_policy(model, LatencyCurve.constant(), count, num_ept)
        rows, length = 1, 1.0
        if policies:
            rows, length = policies[-1].max_rows, policies[-1].acceptance_length
        # More by more than rounding: rows without use are left out.
        if policy.max_rows > rows and policy.acceptance_length > length + 1e-9:
            policies.append(policy)
    return policies


def _by_row_price(
    model: AcceptanceModel, max_rows: int, num_ept: int
) -> list[SearchedPolicy]:
    """By falling row price, so by rising rows; at least one row apart."""
    policies: list[SearchedPolicy] = []
    for price in ROW_PRICES:
        curve = LatencyCurve.linear(1.0, float(price))
        policy = best_policy(model, curve, max_rows, num_ept)
        if policies:
            last = policies[-1]
            least = _LEAST_GAIN * policy_value(last.trees, model, curve)[1]
            if least < policy.tokens_per_second and policy.max_rows >= last.max_rows:
                # The menu tells its entries apart by their rows.
                policy = best_policy(model, curve, last.max_rows - 1, num_ept)
            if policy.tokens_per_second <= least:
                continue
        if policy.max_rows == 1:
            break
        policies.append(policy)
    return policies[::-1]


def menu_for(
    folder: Path | None,
    num_prompt_tokens: int,
    num_ept: int,
    *,
    bigram: bool,
    ngram: bool,
    max_rows: int,
    fixed_rows: bool,
    tree_file: str | None = None,
) -> TreeMenu:
    """The menu that an engine serves for a prompt-token folder.

    The user's own file; else the folder's trees.json, if it is for the same sources of
    draft tokens; else one searched for the folder's acceptance model, or typical one.

    Args:
        folder: the prompt tokens'; None for none.
        num_prompt_tokens, num_ept: what it holds.
        bigram, ngram: which sources of draft tokens are in use.
        max_rows: most rows of a request's step, root included.
        fixed_rows: see `build_menu`.
        tree_file: the user's own menu.

    Raises:
        FormatError, TreeError, MeasurementError: a file that cannot be used here, or
            nothing to draft from.
    """
    if not (num_prompt_tokens or bigram or ngram):
        raise TreeError(
            "without prompt tokens, with ngram off and with bigram or online off there "
            "is nothing to draft from; leave them on, or make prompt tokens with "
            "vllm-ppd train"
        )
    if tree_file is not None:
        menu = load_menus(tree_file)[fixed_rows]
        _require_prompts(menu, tree_file, num_prompt_tokens, num_ept)
        if menu.entries[0].max_rows > max_rows:
            raise TreeError(
                f"num_speculative_tokens is {max_rows - 1}, too small for the tree "
                f"menu {tree_file}, which needs at least {menu.draft_lengths[0]}"
            )
        limited = menu.limited(max_rows)
        assert limited is not None  # its first entry fits
        return limited
    own = None if folder is None else folder / MENU_FILE
    if bigram and ngram and own is not None and own.exists():
        menu = load_menus(own)[fixed_rows]
        _require_prompts(menu, str(own), num_prompt_tokens, num_ept)
        limited = menu.limited(max_rows)
        if limited is not None and 2 * limited.max_rows > min(max_rows, menu.max_rows):
            return limited
    model = acceptance_for(folder, num_prompt_tokens, bigram=bigram, ngram=ngram)
    return build_menu(model, max_rows, num_ept, fixed_rows)


def acceptance_for(
    folder: Path | None, num_prompt_tokens: int, *, bigram: bool, ngram: bool
) -> AcceptanceModel:
    """The folder's acceptance model, or a typical one, for these sources of drafts."""
    model = AcceptanceModel.of_folder(folder, num_prompt_tokens)
    if not bigram:
        model = model.without_bigram()
    return model.with_typical_ngrams() if ngram else model.without_ngram()


def _require_prompts(menu: TreeMenu, path: str, m: int, e: int) -> None:
    if (menu.num_prompt_tokens, menu.num_ept) != (m, e):
        raise TreeError(
            f"the tree menu {path} is for {menu.num_prompt_tokens} prompt tokens of "
            f"{menu.num_ept} EPT, but {m} of {e} are served; write it again with "
            "vllm-ppd calibrate"
        )


def prior_lengths(
    menu: TreeMenu, profile: LatencyProfile, buckets: Sequence[int]
) -> list[int]:
    """The draft length that each load bucket starts with, by the machine's profile.

    Args:
        menu: whose entries say what they are expected to accept; where they do not,
            every bucket starts with plain decoding.
        profile: of the machine.
        buckets: largest number of running requests of each.
    """
    lengths = []
    for num_running in buckets:
        curve = profile.curve(num_running)
        best, best_speedup = 0, _LEAST_SPEEDUP
        for entry in menu.entries:
            speedup = expected_speedup(entry, curve)
            if speedup is not None and speedup > best_speedup:
                best, best_speedup = entry.num_draft_tokens, speedup
        lengths.append(best)
    return lengths


def step_ratios(
    menu: TreeMenu, profile: LatencyProfile, buckets: Sequence[int]
) -> list[list[float]]:
    """[bucket][entry] step time over plain decoding's, by the machine's profile."""
    curves = [profile.curve(num_running) for num_running in buckets]
    return [[step_ratio(entry, curve) for entry in menu.entries] for curve in curves]
