"""Several ranks, and several engines in one process, decode as plain vLLM does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine import engine_process
from tests.engine.conftest import GREEDY, PROMPTS, cpu_only, engine_with, mixed, same
from tests.engine.test_draft_lengths import two_entries
from tests.engine.test_selection import PPD, configure
from vllm_ppd.engine import select
from vllm_ppd.engine.scheduling import attach_controller
from vllm_ppd.prompt_tokens.tokens import PromptTokens
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.menu import TreeMenu

__all__ = ["two_entries"]

pytestmark = cpu_only


def by_turns(llm: Any, prompts: Any, params: Any, lengths: list[int]) -> Any:
    """Generate, with another of these draft lengths after every third step; returns
    the outputs and the draft lengths that were used."""
    controller, used = engine_process.controller_of(llm), []

    def observe(running: int, draft_length: int, *_: Any) -> None:
        used.append(draft_length)
        controller.hold(lengths[len(used) // 3 % len(lengths)])

    controller.hold(lengths[0])
    controller.observe = observe
    return engine_process.generate(llm, prompts, params), sorted(set(used))


def test_two_ranks(two_ranks, start, plain_engine, ppd_engine, texts, two_entries):
    seeded = [{"temperature": 1.0, "seed": i, "ignore_eos": True} for i in range(3)]
    params = [{**each, "max_tokens": 40} for each in [*[GREEDY] * 3, *seeded]]
    what = {"prompts": mixed(texts, 3) * 2, "params": params}
    more = {"max_model_len": 256, "max_num_seqs": 8, **two_ranks}
    # Ray changes nothing about plain decoding.
    stock = {**plain_engine, **more, "distributed_executor_backend": "mp"}
    # A machine may have fewer NUMA nodes than ranks.
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    expected = start(**bind).generate(stock, **what)
    engine = engine_with({**ppd_engine, **more}, tree=two_entries)
    process = start(ray=more["distributed_executor_backend"] == "ray", **bind)
    turns = {"lengths": [13, 0, 5, 13, 5, 0], **what}
    found, used = process.call("test_parallel:by_turns", engine, **turns)
    same(expected, found)
    assert process.accepted(engine) > 0
    assert used == [0, 5, 13]


@pytest.mark.parametrize("engines", [1, 2])
def test_data_parallel_engines_have_one_draft_length(monkeypatch, engines):
    """Where they step together: the one for all loads that the largest can bear."""
    rows = (1, 2, 4, 8, 16)
    # Rows are cheap for one request and as dear as whole steps for many.
    table = ((1.0, 1.02, 1.04, 1.08, 1.16), tuple(map(float, rows)))
    profile = LatencyProfile((1, 16), rows, table, {})
    monkeypatch.setattr(select, "known_profile", lambda *_: profile)
    config = configure(PPD, data_parallel_size=engines, max_num_seqs=16)
    scheduler = SimpleNamespace(
        vllm_config=config, scheduler_config=config.scheduler_config
    )
    attach_controller(scheduler)
    lengths = scheduler.dynamic_sd_lookup[1:]
    assert lengths[-1] == 0 and (set(lengths) == {0}) == (engines > 1)


def in_turn(llms: list[Any], prompts: Any, params: Any) -> list[Any]:
    """Of each engine, the steps that requests took and their outputs; the engines'
    steps alternate."""
    found: list[dict[int, Any]] = [{} for _ in llms]
    engines = [llm.llm_engine for llm in llms]
    for engine in engines:
        for index, each in enumerate(zip(prompts, params, strict=True)):
            engine.add_request(str(index), *each)
    step = 0
    while any(engine.has_unfinished_requests() for engine in engines):
        step += 1
        for engine, done in zip(engines, found, strict=True):
            for output in engine.step():
                if output.finished:
                    result = engine_process._result(output)
                    done[int(output.request_id)] = step, result
    return [[done[index] for index in sorted(done)] for done in found]


def beside(llm: Any, others: list[Any], **what: Any) -> dict[str, Any]:
    """What an engine does by itself, what others that start after it do by themselves,
    and all of them at the same time; and the reports of the two that have PPD."""
    from vllm import LLM

    first = in_turn([llm], **what)
    llms = [llm, *(LLM(**each) for each in others)]
    alone = first + [in_turn([each], **what)[0] for each in llms[1:]]
    together = in_turn(llms, **what)
    reports = [engine_process.report(each) for each in llms[:2]]
    return {"alone": alone, "together": together, "reports": reports}


def test_engines_in_one_process(
    start, plain, plain_engine, ppd_engine, texts, tmp_path
):
    """Two with prompt tokens of their own and a plain one, one after another and at the
    same time: each drafts as if it were alone."""
    trained = PromptTokens.load(PROMPTS)
    PromptTokens(trained.embeddings[:2], trained.base).save(tmp_path / "two")
    params = [{**GREEDY, "max_tokens": 40 + 9 * i} for i in range(4)]
    what = {"prompts": mixed(texts, 4, first=90), "params": params}
    expected = plain.generate(plain_engine, **what)
    # Prompts are read each time, and drafts depend on nothing that was learnt.
    stock = {**plain_engine, "enable_prefix_caching": False}
    speculative = {**ppd_engine["speculative_config"], "online": False}
    three = {**stock, "speculative_config": speculative}
    two = engine_with(three, model=str(tmp_path / "two"))
    seen = start().call("test_parallel:beside", three, others=[two, stock], **what)
    for outputs in (*seen["alone"], *seen["together"]):
        same(expected, [output for _, output in outputs])
    assert seen["together"] == seen["alone"]
    steps = [[step for step, _ in outputs] for outputs in seen["alone"]]
    assert steps[0] != steps[1] and max(map(max, steps[:2])) < max(steps[2])
    menus = [TreeMenu.from_dict(report["menu"]) for report in seen["reports"]]
    assert [menu.num_prompt_tokens for menu in menus] == [3, 2]
