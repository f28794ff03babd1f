"""The V2 runner on a CPU, through Triton's interpreter: for tests without a GPU."""

from __future__ import annotations

from typing import Any

import vllm.v1.worker.cpu.model_runner as cpu_runner
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ppd.engine.v2.runner import TreeRunnerMixin


class PPDCPUModelRunnerV2(TreeRunnerMixin, CPUModelRunner):
    """The V2 model runner on a CPU, speculating with prompt tokens."""


class PPDCPUWorkerV2(CPUWorker):
    def init_device(self) -> None:
        register_backend(
            AttentionBackendEnum.CPU_ATTN,
            "vllm_ppd.engine.v2.attention_cpu.PPDCPUAttentionBackendV2",
        )
        # CPUWorker imports the runner class inline; there is no method to override.
        stock, cpu_runner.CPUModelRunner = (
            cpu_runner.CPUModelRunner,
            PPDCPUModelRunnerV2,
        )
        try:
            super().init_device()
        finally:
            cpu_runner.CPUModelRunner = stock

    def compile_or_warm_up_model(self) -> Any:
        # First, because the stock method seeds the random numbers at its end.
        self.model_runner.measure_machine()
        times = super().compile_or_warm_up_model()
        self.model_runner.start_serving()
        return times

    def ppd_report(self) -> dict[str, Any]:
        """What the trees do now; ask with ``llm.collective_rpc("ppd_report")``."""
        return self.model_runner.ppd_report()
