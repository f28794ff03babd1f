"""C++ kernels for vLLM's CPU backend, compiled at first use."""

from vllm_ppd.kernels.cpu.bigram import CpuBigramLearner
from vllm_ppd.kernels.cpu.build import load_library
from vllm_ppd.kernels.cpu.fill_tree import CpuTreeFiller
from vllm_ppd.kernels.cpu.kv_compact import CpuKVCompactor
from vllm_ppd.kernels.cpu.layout import key_view, value_view
from vllm_ppd.kernels.cpu.tree_attention import CpuTreeAttention
from vllm_ppd.kernels.cpu.tree_walk import match_ngrams_cpu, walk_greedy_cpu

__all__ = [
    "CpuBigramLearner",
    "CpuKVCompactor",
    "CpuTreeAttention",
    "CpuTreeFiller",
    "key_view",
    "load_library",
    "match_ngrams_cpu",
    "value_view",
    "walk_greedy_cpu",
]
