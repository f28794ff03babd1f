"""vLLM's workers with PPD's model runners and attention: V1 on CPU, V2 on CPU and GPU.

Each measures the machine after its warm-up, if this start has to, compares a tree step
with plain steps, and then starts to count and to learn; what ran before was no traffic.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.v1.worker.cpu_worker as cpu_worker
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from vllm_ppd.engine.attention import register_tree_backend
from vllm_ppd.engine.canary import check_trees
from vllm_ppd.engine.measure import MeasuredRunner, measured_profile
from vllm_ppd.engine.patches import replaced
from vllm_ppd.engine.settings import PPDSpeculativeConfig, serving_settings
from vllm_ppd.engine.v1.executor import attach_drafts
from vllm_ppd.engine.v1.measure import MeasuredSteps as MeasuredOnV1
from vllm_ppd.engine.v2.measure import MeasuredSteps as MeasuredOnV2
from vllm_ppd.search.latency import LatencyProfile

_CPU_BACKEND = "vllm_ppd.engine.attention.PPDCPUAttentionBackend"


class _PPDWorker:
    """What every PPD worker does at its start, and answers to ``collective_rpc``."""

    model_runner: Any
    vllm_config: Any
    ppd_measured: LatencyProfile | None = None

    def ppd_try_out(self, steps: type[MeasuredRunner]) -> None:
        """Time steps, if this start has to, and compare a tree's with plain ones."""
        runner, config = self.model_runner, self.vllm_config
        with replaced(*runner.ppd_processors()):
            self.ppd_measured = measured_profile(
                serving_settings(config),
                steps(runner),
                keep=not config.parallel_config.data_parallel_index,
            )
            check_trees(runner)

    def ppd_profile(self) -> dict[str, Any] | None:
        """The latency profile that this start measured; None if it measured none."""
        return None if self.ppd_measured is None else self.ppd_measured.to_dict()

    def ppd_report(self) -> dict[str, Any]:
        """What PPD does now: the menu, the latency profile and whether this start has
        measured it, and the log's next line."""
        settings, log = serving_settings(self.vllm_config), self.model_runner.ppd_log
        return {
            "menu": settings.menu,
            "line": None if log is None else log.line(),
            "profile": self.ppd_profile() or settings.profile,
            "measured": self.ppd_measured is not None,
        }


class PPDCPUWorker(_PPDWorker, CPUWorker):
    """The CPU worker on the V1 model runner."""

    def init_device(self) -> None:
        from vllm_ppd.engine.v1.runner import PPDCPUModelRunner

        register_tree_backend(AttentionBackendEnum.CPU_ATTN, _CPU_BACKEND)
        # The CPU worker names the class inline.
        with replaced(cpu_worker, "CPUModelRunner", PPDCPUModelRunner):
            super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        # First, because the stock method seeds the random numbers at its end.
        self.ppd_try_out(MeasuredOnV1)
        self.model_runner.start_serving()
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
            # The scheduler has dropped the scheduled drafts already: nothing to say.
            drafts = None
        return attach_drafts(output, drafts)


class PPDCPUWorkerV2(_PPDWorker, CPUWorker):
    """The CPU worker on the V2 model runner, by Triton's interpreter: for tests."""

    def init_device(self) -> None:
        import vllm.v1.worker.cpu.model_runner as cpu_runner

        from vllm_ppd.engine.v2.runner import runner_class

        register_tree_backend(AttentionBackendEnum.CPU_ATTN, _CPU_BACKEND)
        served = runner_class(cpu_runner.CPUModelRunner)
        with replaced(cpu_runner, "CPUModelRunner", served):
            super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        self.ppd_try_out(MeasuredOnV2)
        times = super().compile_or_warm_up_model()
        self.model_runner.start_serving()
        return times


class PPDWorker(_PPDWorker, Worker):
    """The GPU worker on the V2 model runner."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        is_ppd = isinstance(vllm_config.speculative_config, PPDSpeculativeConfig)
        if not (is_ppd and vllm_config.use_v2_model_runner):
            raise ValueError(
                "speculative method 'ppd' was set up for vLLM's V2 model runner, but "
                "this worker runs V1: set VLLM_USE_V2_MODEL_RUNNER alike for all "
                "processes, or nowhere"
            )
        # It needs Triton, which V1 does not.
        from vllm_ppd.engine.v2.attention import gpu_backend_path

        register_tree_backend(
            AttentionBackendEnum.CUSTOM,
            gpu_backend_path(vllm_config.model_config.dtype),
        )
        super().__init__(vllm_config, *args, **kwargs)

    def _make_model_runner(self) -> Any:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        from vllm_ppd.engine.v2.runner import runner_class

        return runner_class(GPUModelRunner)(self.vllm_config, torch.device(self.device))

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        # Now that there are graphs; then as if it had not been.
        self.ppd_try_out(MeasuredOnV2)
        set_random_seed(
            self.model_config.seed, self.parallel_config.data_parallel_index
        )
        self.model_runner.start_serving()
        return times
