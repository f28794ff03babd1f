"""The V2 model runner on a GPU, speculating with prompt tokens."""

from __future__ import annotations

from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_ppd.engine.v2.runner import TreeRunnerMixin


class PPDGPUModelRunnerV2(TreeRunnerMixin, GPUModelRunner):
    pass
