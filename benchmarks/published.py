"""Models by their shape alone, whose draft tokens are accepted as somebody published.

Weights and prompt tokens are random. The engine does all of its work, verification
included, but which child a walk goes to is drawn from published probabilities instead
of read off the target's tokens. The text is then nonsense; its length, the rows and the
KV moves are what the published model would have had. For measuring only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from results import ROOT

# The acceptance that the paper's authors published for this model.
TABLE = ROOT / "benchmarks" / "data" / "vicuna-7b-v1.3.json"
# hidden, intermediate, layers, heads, KV heads, head size, vocabulary
SHAPES = {
    "1b": (2048, 8192, 16, 32, 8, 64, 128256),  # Llama 3.2 1B
    "7b": (4096, 11008, 32, 32, 32, 128, 32000),  # Vicuna 7B
    "8b": (4096, 14336, 32, 32, 8, 128, 128256),  # Llama 3.1 8B
    "13b": (5120, 13824, 40, 40, 40, 128, 32000),  # Vicuna 13B
    "tiny": (64, 128, 2, 4, 2, 32, 64),
}


def make_model(shape: str, table: list[list[float]], folder: Path) -> tuple[str, str]:
    """Folders of a configuration without weights, and of prompt tokens for it."""
    import torch
    from transformers import LlamaConfig

    from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
    from vllm_ppd.prompt_tokens.tokens import PromptTokens
    from vllm_ppd.search.acceptance import ACCEPTANCE_FILE, AcceptanceModel

    hidden, inner, layers, heads, kv_heads, size, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    model, prompts = folder / f"model-{shape}", folder / f"prompts-{shape}"
    config.save_pretrained(model)
    embeddings = torch.randn(len(table), 1, hidden) * 0.02
    PromptTokens(embeddings, BaseModelFingerprint.of_folder(str(model))).save(prompts)
    AcceptanceModel.of(table).save(prompts / ACCEPTANCE_FILE)
    return str(model), str(prompts)


def save_trees(table: Any, rows: int, folder: Path) -> tuple[str, int]:
    """A file of one menu entry, the best trees of `rows` rows; its draft length."""
    from vllm_ppd.search.acceptance import AcceptanceModel
    from vllm_ppd.search.latency import LatencyCurve
    from vllm_ppd.search.policy_iteration import best_policy
    from vllm_ppd.trees.menu import TreeMenu, save_menus

    model = AcceptanceModel.of(table)
    entry = best_policy(model, LatencyCurve.constant(), rows).entry()
    menu, file = TreeMenu((entry,)), folder / f"trees-{rows}.json"
    save_menus(file, menu, menu)
    return str(file), entry.num_draft_tokens


def load_table(path: Path) -> list[list[float]]:
    """[distance, rank] acceptance probabilities of a file in benchmarks/data."""
    content = json.loads(path.read_text(encoding="utf-8"))
    table = content.get("marginal") or content.get("acceptance")
    if not table:
        raise ValueError(f"{path} has no acceptance table, as benchmarks/data has them")
    return table


def replay(llm: Any, table: list[list[float]]) -> None:
    """In the workers of an engine on the V2 runner, on the device."""
    llm.collective_rpc(_replay_in_worker, args=(table,))


def _replay_in_worker(worker: Any, table: list[list[float]]) -> None:
    import torch

    from vllm_ppd.engine.v2.sampling import TreeSampler
    from vllm_ppd.engine.v2.step_trees import step_of

    del worker
    probabilities = np.asarray(table)
    stock = TreeSampler._sample
    kept: dict[str, Any] = {}

    def sample(self: Any, logits: Any, batch: Any) -> Any:
        sampled, processed = stock(self, logits, batch)
        step = step_of(batch)
        assert step is not None
        tables = step.tables
        if not kept:
            kept["low"], kept["high"] = (
                torch.from_numpy(bound).to(logits.device, torch.float32)
                for bound in _intervals(tables, probabilities)
            )
            kept["node"] = torch.arange(tables.parents.shape[1], device=logits.device)
        node, ids = kept["node"], step.tree_ids
        parents = tables.parents[ids].long()  # [B, N]
        nodes = torch.minimum(tables.num_nodes[ids], step.num_rows)
        # One draw per node decides which of its children is right, if any.
        draw = torch.rand(parents.shape, device=logits.device)
        draw = draw.gather(1, parents.clamp(min=0))
        hit = (kept["low"][ids] <= draw) & (draw < kept["high"][ids])
        hit &= (parents >= 0) & (node < nodes[:, None])
        rows = (step.starts[:, None] + node).clamp(max=len(batch.input_ids) - 1)
        # Where no child is right the token is one that next to no child has.
        picked = sampled.new_full((len(sampled) + 1,), 3)
        places = batch.cu_num_logits[:-1, None] + parents
        places = torch.where(hit, places, len(sampled))
        picked[places] = batch.input_ids[rows].to(picked.dtype)
        return picked[:-1], processed

    TreeSampler._sample = sample  # type: ignore[method-assign]


def _intervals(tables: Any, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[S, N] bounds: a draw between them at a node's parent leads to the node."""
    parents = tables.parents.cpu().numpy()
    depths = np.clip(tables.node_depths.cpu().numpy(), 1, len(probabilities))
    ranks = np.minimum(tables.node_ranks.cpu().numpy(), probabilities.shape[1] - 1)
    chance = np.where(parents >= 0, probabilities[depths - 1, ranks], 0.0)
    node = np.arange(parents.shape[1])
    earlier = (parents[:, :, None] == parents[:, None, :]) & (node < node[:, None])
    low = np.einsum("sij,sj->si", earlier.astype(float), chance)
    return low, low + chance
