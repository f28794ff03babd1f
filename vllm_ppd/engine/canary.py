"""The canary: before it serves, an engine compares a tree step with plain steps.

A made-up request runs a tree of the menu, of which a path that has to move is accepted.
Others read the tree's paths as prompts. Logits and KV entries must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import vllm
from vllm.distributed import get_world_group
from vllm.logger import init_logger

import vllm_ppd
from vllm_ppd.config import PPDConfigError
from vllm_ppd.engine.made_up_requests import MadeUpRequests
from vllm_ppd.trees.menu import TreeMenu

logger = init_logger("vllm.ppd")

# Tokens before the root: few, so that a row that must not be seen weighs much.
_CONTEXT = 4
_MOST_PATHS = 24
# Rounding may be unlucky, but hardly again with other tokens.
_ATTEMPTS = 3
# Largest relative distance: about five times what rounding makes of it, and a third of
# what a wrong mask or move does. GPUs may multiply float32 no better than float16.
_TOLERANCE = {torch.float32: 0.0125, torch.float16: 0.0125, torch.bfloat16: 0.12}
# Activations may be rounded to 8 bits, and a token sent to another expert.
_COARSE_TOLERANCE = 0.3
# Rounding moves logits so much more than KV entries.
_LOGITS_SCALE = 6


@torch.inference_mode()
def check_trees(runner: Any) -> None:
    """Refuse to serve if a tree gives other results than plain steps, on any rank.

    Args:
        runner: with PPD, ready to serve, and without requests.

    Raises:
        PPDConfigError: on all ranks.
    """
    model, limits = runner.model_config, runner.scheduler_config
    groups = runner.kv_cache_config.kv_cache_groups
    size = min(group.kv_cache_spec.block_size for group in groups)
    blocks = (runner.kv_cache_config.num_blocks - 1) // len(groups)
    # A request has its context, a tree and two tokens that are emitted.
    most_tokens = min(model.max_model_len, limits.max_num_batched_tokens, blocks * size)
    menu = runner.ppd_menu.limited(most_tokens - _CONTEXT - 2)
    if menu is None:
        logger.info("PPD's canary does not run: a step or the KV cache holds no tree")
        return
    length = _CONTEXT + menu.max_rows + 2
    most_paths = min(
        _MOST_PATHS,
        limits.max_num_seqs,
        limits.max_num_batched_tokens // length,
        blocks // -(-length // size),
    )
    coarse = model.quantization or model.is_moe
    tolerance = _COARSE_TOLERANCE if coarse else _TOLERANCE[model.dtype]
    found = np.inf
    for seed in range(_ATTEMPTS):
        found = min(found, _distance(runner, menu, most_paths, seed))
        logger.debug("PPD's canary: distance %.2g of %.2g", found, tolerance)
        if found <= tolerance:
            return
    raise PPDConfigError(
        "speculative method 'ppd' computes other logits or KV entries in a tree step "
        f"than in plain steps (by {found:.2g}, of which {tolerance} may be rounding), "
        f"with model {model.model}, attention backend "
        f"{runner.attn_groups[0][0].backend.__name__}, vllm {vllm.__version__}, torch "
        f"{torch.__version__} and vllm_ppd {vllm_ppd.__version__}: serve without PPD, "
        "by leaving out --speculative-config or --speculative-model"
    )


def _distance(runner: Any, menu: TreeMenu, most_paths: int, seed: int) -> float:
    """Largest relative distance of a row's logits, or of its KV entries in all layers
    together, on any rank."""
    tree_id = menu.first_trees[-1] + menu.num_prompt_tokens
    if menu.trees[tree_id].num_rows == 1:
        # Without prompt tokens and bigrams only trees of n-gram matches have drafts.
        later = range(tree_id, len(menu.trees))
        tree_id = max(later, key=lambda index: menu.trees[index].num_rows)
    tree = menu.trees[tree_id]
    # The last node's path has to move, unless the tree is a chain.
    accepted = np.flatnonzero(tree.mask[tree.num_nodes - 1]).tolist()
    # A path ends with a row that no other row sees. The accepted one comes first.
    ends = tree.mask.sum(0) == 1
    paths = [np.flatnonzero(row).tolist() for row in tree.mask[ends]]
    paths.sort(key=lambda path: accepted[-1] not in path)
    paths = paths[:most_paths]
    rows = [row for path in paths for row in path]

    # All words differ, so siblings do.
    vocab_size = runner.model_config.get_vocab_size()
    shuffled = np.random.default_rng(seed).permutation(vocab_size)
    words: list[int] = np.resize(shuffled, _CONTEXT + tree.num_nodes).tolist()
    prompt, nodes = words[:_CONTEXT], words[_CONTEXT:]
    soft = [index * tree.num_ept + ept for _, index, ept in tree.prompt_rows]
    ids = [*nodes, *(vocab_size + index for index in soft)]

    # Padded as V2 serves it, so that a CUDA graph runs where there is one.
    drafts = ids[1:] + [0] * (menu.max_rows - tree.num_rows)
    branched = MadeUpRequests(runner, 1, 1, menu.max_rows, [prompt])
    (name,), (arrival,) = branched.ids, branched.prefill()
    _run(runner, arrival, {0: ids[0]})
    runner.ppd_pend(name, tree_id, drafts)
    walk = {parent: ids[child] for parent, child in pairwise(accepted)}
    hidden = _run(runner, branched.decode({name: drafts}), walk)[name][rows]
    # Accepted rows now lie behind the context, where other rows' entries are lost.
    kept = [n for n, row in enumerate(rows) if row in accepted or row >= len(accepted)]
    places = [accepted.index(row) if row in accepted else row for row in rows]
    entries = [(branched.blocks[name], _CONTEXT + places[n]) for n in kept]
    cached = _cached(runner, entries)
    runner.execute_model(branched.finish())

    prompts = [prompt + [ids[row] for row in path] for path in paths]
    plain = MadeUpRequests(runner, len(paths), 1, 1, prompts)
    (arrival,) = plain.prefill()
    outputs = _run(runner, arrival, {})
    plain_hidden = torch.cat([outputs[name][_CONTEXT:] for name in plain.ids])
    entries = [
        (plain.blocks[name], place)
        for name, read in zip(plain.ids, prompts, strict=True)
        for place in range(_CONTEXT, len(read))
    ]
    plain_cached = _cached(runner, [entries[n] for n in kept])
    runner.execute_model(plain.finish())

    logits, plain_logits = (
        # A model may rule words out with -inf; what is not a number is found.
        runner.model.compute_logits(states).float().nan_to_num(torch.nan, neginf=0.0)
        for states in (hidden, plain_hidden)
    )
    spread = (plain_logits - plain_logits.mean(1, keepdim=True)).norm(dim=1)
    by_logits = (logits - plain_logits).norm(dim=1) / spread / _LOGITS_SCALE
    by_cache = [
        (own - other).norm(dim=1) / other.norm(dim=1).mean()
        for own, other in zip(cached, plain_cached, strict=True)
    ]
    by_entry = torch.stack(by_cache).square().mean(0).sqrt()
    found = torch.cat([by_entry, by_logits]).max().nan_to_num(torch.inf).cpu()
    if (group := get_world_group()).world_size > 1:
        largest = torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(found, largest, group.cpu_group)
    return float(found)


def _run(runner: Any, step: Any, emitted: Mapping[int, int]) -> dict[str, torch.Tensor]:
    """Each request's hidden states in a step, of which some rows emit given tokens.

    Args:
        emitted: tokens by row among those with logits.
    """
    model, stock = runner.model, runner.model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = stock(*args, **kwargs)
        for row, token in emitted.items():
            logits[row, token] = torch.finfo(logits.dtype).max
        return logits

    model.compute_logits = compute_logits
    runner.execute_model(step)
    state = runner.execute_model_state
    batch = getattr(state, "input_batch", None) or runner.input_batch
    counts = [step.num_scheduled_tokens[name] for name in batch.req_ids]
    # A copy: a CUDA graph's next replay overwrites them.
    hidden = state.hidden_states[: sum(counts)].clone().split(counts)
    found = dict(zip(batch.req_ids, hidden, strict=True))
    runner.sample_tokens(None)
    del model.compute_logits
    return found


def _cached(runner: Any, entries: Sequence[tuple[Any, int]]) -> list[torch.Tensor]:
    """KV entries, each of a request's blocks and a position, in every cache: float32
    [n, width]."""
    groups, found = runner.kv_cache_config.kv_cache_groups, []
    for index, compactor in enumerate(runner.ppd_mover.groups):
        size = groups[index].kv_cache_spec.block_size
        slots = [blocks[index][n // size] * size + n % size for blocks, n in entries]
        for view in compactor.views:
            slot = torch.tensor(slots, device=view.device)
            # A cache may have smaller blocks than vLLM's manager.
            block, place = slot // view.shape[2], slot % view.shape[2]
            found.append(view[block, :, place].flatten(1).float())
    return found
