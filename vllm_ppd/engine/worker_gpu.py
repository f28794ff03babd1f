"""vLLM's GPU worker with PPD's model runner and attention, on V2 or V1."""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_ppd.engine.v1.runner import PPDRunnerMixin
from vllm_ppd.engine.v2.config import is_v2_config


class PPDGPUModelRunner(PPDRunnerMixin, GPUModelRunner):
    """The V1 model runner on a GPU, speculating with prompt tokens."""


class PPDWorker(Worker):
    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        on_v2 = is_v2_config(vllm_config.speculative_config)
        if on_v2 != vllm_config.use_v2_model_runner:
            raise ValueError(
                f"speculative method 'ppd' was set up for vLLM's {_name(on_v2)} model "
                f"runner, but this worker runs {_name(not on_v2)}: set "
                "VLLM_USE_V2_MODEL_RUNNER alike for all processes, or nowhere"
            )
        backend = "vllm_ppd.engine.v1.attention_gpu.PPDFlashAttentionBackend"
        if on_v2:
            from vllm_ppd.engine.v2.attention_gpu import backend_path

            backend = backend_path(vllm_config.model_config.dtype)
        register_backend(AttentionBackendEnum.CUSTOM, backend)
        super().__init__(vllm_config, *args, **kwargs)

    def _make_model_runner(self) -> Any:
        device = torch.device(self.device)
        if not self.use_v2_model_runner:
            return PPDGPUModelRunner(self.vllm_config, device)
        # Imported here: it needs Triton, which V1 does not.
        from vllm_ppd.engine.v2.runner_gpu import PPDGPUModelRunnerV2

        return PPDGPUModelRunnerV2(self.vllm_config, device)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        if self.use_v2_model_runner:
            # Now that there are graphs; then as if it had not been.
            self.model_runner.measure_machine()
            set_random_seed(
                self.model_config.seed, self.parallel_config.data_parallel_index
            )
            self.model_runner.start_serving()
        return times

    def ppd_report(self) -> dict[str, Any]:
        """What the trees do now; ask with ``llm.collective_rpc("ppd_report")``."""
        return self.model_runner.ppd_report()


def _name(v2: bool) -> str:
    return "V2" if v2 else "V1"
