"""vLLM's GPU worker with PPD's V1 model runner and attention."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_ppd.engine.runner_v1 import PPDRunnerMixin


class PPDGPUModelRunner(PPDRunnerMixin, GPUModelRunner):
    """The V1 model runner on a GPU, speculating with prompt tokens."""


class PPDWorker(Worker):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        register_backend(
            AttentionBackendEnum.CUSTOM,
            "vllm_ppd.engine.attention_gpu.PPDFlashAttentionBackend",
        )
        super().__init__(*args, **kwargs)

    def _make_model_runner(self) -> GPUModelRunner:
        if self.use_v2_model_runner:
            raise ValueError(
                "speculative method 'ppd' runs on vLLM's V1 model runner: unset "
                "VLLM_USE_V2_MODEL_RUNNER"
            )
        return PPDGPUModelRunner(self.vllm_config, torch.device(self.device))
