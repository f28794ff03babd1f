"""What a user can say, and how wrong choices are refused before an engine starts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from typing import Any
from unittest.mock import Mock

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.engine.conftest import MODEL, PROMPTS
from vllm_ppd.engine import select
from vllm_ppd.engine.select import V1_WORKER, V2_WORKERS
from vllm_ppd.engine.settings import KEY, serving_settings
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.latency import LatencyProfile

PPD = {"method": "ppd", "model": str(PROMPTS)}


def configure(speculative: dict[str, Any] | None, **args: Any) -> Any:
    args = {"model": str(MODEL), "max_model_len": 256, **args}
    return EngineArgs(speculative_config=speculative, **args).create_engine_config()


def from_cli(*flags: str) -> Any:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", str(MODEL), *flags])
    return EngineArgs.from_cli_args(parsed).create_engine_config()


def test_a_profiles_key_holds_plain_values():
    """It travels in messages between vLLM's processes, which take nothing else."""
    key = serving_settings(configure(PPD)).profile_key
    assert {type(value) for value in key.values()} <= {str, int, bool, type(None)}


def is_ppd(config: Any) -> bool:
    settings = serving_settings(config)
    return (
        config.parallel_config.worker_cls in (V1_WORKER, *V2_WORKERS.values())
        and settings.path == str(PROMPTS.resolve())
        and config.speculative_config.num_speculative_tokens
        == settings.tree_menu().max_rows - 1
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--speculative-model", f"ppd:{PROMPTS}"],
        ["--speculative-model", "ppd"],
        ["--spec-model", f"ppd:{PROMPTS}"],
        ["--spec-model", f"ppd:{PROMPTS}", "--spec-tokens", "6"],
        ["--speculative-config", json.dumps(PPD)],
        ["--speculative-config", json.dumps({"model": f"ppd:{PROMPTS}"})],
        ["--speculative-config", json.dumps(PPD), "--spec-tokens", "5"],
    ],
    ids=lambda flags: " ".join(f.split("/")[-1] for f in flags),
)
def test_every_way_in_from_the_command_line(flags):
    config = from_cli(*flags)
    assert is_ppd(config)
    if "--spec-tokens" in flags:
        assert config.speculative_config.num_speculative_tokens <= int(flags[-1])


def test_every_way_in_from_python():
    assert is_ppd(configure(PPD))
    assert is_ppd(configure({"model": f"ppd:{PROMPTS}"}))
    assert is_ppd(configure({**PPD, "num_speculative_tokens": 4}))
    assert is_ppd(configure(PPD, additional_config={"other": 1}))
    assert is_ppd(configure({"method": "ppd"}))


def test_a_model_without_known_prompt_tokens(monkeypatch, tmp_path):
    monkeypatch.setattr("vllm_ppd.prompt_tokens.tokens.TRAINED", tmp_path)
    said = []
    monkeypatch.setattr(select.logger, "info", lambda *line: said.append(line))
    settings = serving_settings(configure({"method": "ppd"}))
    assert (settings.path, settings.num_prompt_tokens) == (None, 0)
    assert settings.learns_bigram and settings.ngram and not settings.bigram
    text = said[-1][0] % said[-1][1:]
    assert "drafts from bigrams that it learns and n-gram matches" in text
    assert f"vllm-ppd train --model {MODEL}" in text
    off = {"method": "ppd", "ngram": False, "online": False}
    with pytest.raises(ValueError, match="nothing to draft from; leave them on"):
        configure(off)


def test_without_ppd_vllm_is_as_it_was():
    assert configure(None).speculative_config is None
    config = configure({"method": "ngram", "num_speculative_tokens": 3})
    assert config.speculative_config.method == "ngram"
    for plain in (config, from_cli()):
        assert plain.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
        assert KEY not in (plain.additional_config or {})
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        configure({"method": "ngram", "num_speculative_tokens": -1})


def test_help_names_the_flag():
    parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser())
    assert "--speculative-model ppd:PATH" in parser.format_help()


def test_the_compiled_graphs_key_knows_about_ppd():
    """A graph compiled without soft tokens must not be loaded for PPD."""
    hashes = {
        configure(None).compute_hash(),
        configure(PPD).compute_hash(),
        configure({"method": "ngram", "num_speculative_tokens": 3}).compute_hash(),
    }
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"pipeline_parallel_size": 2}, "-size 2: use --tensor-parallel-size"),
        ({"enable_lora": True}, "--enable-lora: serve the merged model"),
        ({"scheduler_cls": "a.B"}, "--scheduler-cls a.B: leave it out"),
        ({"kv_cache_dtype": "fp8"}, "fp8 with a model of torch.*: set it to "),
        ({"kv_cache_dtype": "float16", "dtype": "bfloat16"}, "set it to bfloat16"),
        ({"kv_cache_dtype": "bfloat16", "dtype": "float32"}, "set it to float32"),
        ({"async_scheduling": True}, "--async-scheduling on a CPU: leave it out"),
        ({"hf_overrides": {"attention_chunk_size": 32}}, "chunked local.* without PPD"),
    ],
)
def test_settings_that_ppd_cannot_serve(args, message):
    with pytest.raises(ValueError, match=rf"'ppd' does not support.*{message}"):
        configure(PPD, **args)


def test_files_of_another_machine_or_model(tmp_path, monkeypatch):
    file = tmp_path / "profile.json"
    LatencyProfile((1,), (1, 8), ((1.0, 1.1),), {"other": 1}).save(file)
    with pytest.raises(ValueError, match="was measured with attention_backend None"):
        configure({**PPD, "profile": str(file)})
    prompts = PromptTokens.load(PROMPTS)
    signs = prompts.base.embedding_signs
    assert signs is not None
    for folder, other in (("far", "0" * len(signs)), ("near", "00" + signs[2:])):
        base = dataclasses.replace(prompts.base, embedding_signs=other)
        PromptTokens(prompts.embeddings, base).save(tmp_path / folder)
    with pytest.raises(ValueError, match="use prompt tokens trained for it"):
        configure({**PPD, "model": str(tmp_path / "far")})
    warned = Mock()
    monkeypatch.setattr(select.logger, "warning", warned)
    configure({**PPD, "model": str(tmp_path / "near")})
    assert "fewer drafts may be accepted" in str(warned.call_args)


def test_a_flag_and_a_key_for_the_same_thing_conflict():
    flags = ("--speculative-config", json.dumps(PPD))
    with pytest.raises(ValueError, match=r"--spec-model and .* both given"):
        from_cli(*flags, "--speculative-model", f"ppd:{PROMPTS}")


def test_a_cache_that_the_checkpoint_asks_for(monkeypatch):
    resolve = "vllm_ppd.engine.refusals.resolve_kv_cache_dtype_string"
    monkeypatch.setattr(resolve, lambda given, model: "fp8_e4m3")
    with pytest.raises(ValueError, match="--kv-cache-dtype fp8_e4m3 with a model of"):
        configure(PPD)


def test_unsupported_vllm_is_refused_only_with_ppd(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.31.0")
    configure(None)
    with pytest.raises(ValueError, match=r"works with vLLM 0.32 and 0.33"):
        configure(PPD)


FORKED = """
import os, sys, torch
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

load_general_plugins()
ppd = {"method": "ppd", "model": sys.argv[2], "profile": "none"}
EngineArgs(model=sys.argv[1], speculative_config=ppd).create_engine_config()
assert torch.get_num_threads() == 2
child = os.fork()
if not child:
    torch.ones(10**7).sum()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("both ended well")
"""


def test_an_engine_that_is_forked_from_the_front_end_can_use_threads():
    """As vLLM does on CUDA: threads that torch had started here would be missing."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(MODEL), str(PROMPTS)],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "both ended well" in done.stdout, done.stderr[-2000:]
