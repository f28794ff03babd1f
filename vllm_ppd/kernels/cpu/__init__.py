"""C++ kernels for vLLM's CPU backend, compiled at first use."""

from .build import load_library
from .fill_trees import CpuTreeFiller
from .kv_compact import CpuKVCompactor
from .layout import key_view, value_view
from .learn_successors import CpuSuccessorLearner
from .tree_attention import CpuTreeAttention
from .walk_trees import match_chains_cpu, walk_greedy_cpu

__all__ = [
    "CpuKVCompactor",
    "CpuSuccessorLearner",
    "CpuTreeAttention",
    "CpuTreeFiller",
    "key_view",
    "load_library",
    "match_chains_cpu",
    "value_view",
    "walk_greedy_cpu",
]
