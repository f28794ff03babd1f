"""vLLM's CPU worker with PPD's model runner and attention."""

from __future__ import annotations

from typing import Any

import vllm.v1.worker.cpu_worker as cpu_worker
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ppd.engine.profiling import plan_for_this_machine
from vllm_ppd.engine.v1.executor import attach_drafts
from vllm_ppd.engine.v1.runner import PPDRunnerMixin


class PPDCPUModelRunner(PPDRunnerMixin, CPUModelRunner):
    """The V1 model runner on a CPU, speculating with prompt tokens."""


class PPDCPUWorker(CPUWorker):
    def init_device(self) -> None:
        register_backend(
            AttentionBackendEnum.CPU_ATTN,
            "vllm_ppd.engine.v1.attention_cpu.PPDCPUAttentionBackend",
        )
        # CPUWorker names the runner class inline; there is no method to override.
        stock, cpu_worker.CPUModelRunner = cpu_worker.CPUModelRunner, PPDCPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = stock

    def compile_or_warm_up_model(self) -> Any:
        # First, because the stock method seeds the random numbers at its end.
        plan_for_this_machine(self.model_runner)
        self.model_runner.start_learning()
        return super().compile_or_warm_up_model()

    def execute_model(self, scheduler_output: Any) -> Any:
        output = super().execute_model(scheduler_output)
        if output is None and not scheduler_output.has_structured_output_requests:
            # No grammar to wait for, so sampling needs no message of its own.
            return self.sample_tokens(None)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        drafts = self.model_runner.take_draft_token_ids()
        if drafts is not None and not any(drafts.draft_token_ids):
            # Scheduled guesses are gone from the scheduler already: nothing to say.
            drafts = None
        return attach_drafts(output, drafts)

    def ppd_report(self) -> dict[str, Any]:
        """What the trees do now; ask with ``llm.collective_rpc("ppd_report")``."""
        return self.model_runner.ppd_report()

    def ppd_hold(self, plan: dict[str, Any] | None = None) -> None:
        """Keep to the trees in force, or to `plan`; for measurements."""
        self.model_runner.ppd_hold(plan)
