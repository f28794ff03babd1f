"""Arithmetic of the prediction and memory benchmarks, without engines."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("accelerate")

from vllm_ppd.adaptive.step_timing import StepTiming
from vllm_ppd.calibrate.measure import Measurement
from vllm_ppd.calibrate.reliability import Reliability
from vllm_ppd.cli.generation import Batch, Generation, Step
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.latency import LatencyCurve
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.search.tree_search import optimal_policy
from vllm_ppd.trees.menu import TreePlan
from vllm_ppd.trees.tree import SparseTree, TreePolicy

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
decoding: Any = importlib.import_module("decoding")
prediction: Any = importlib.import_module("prediction")
plan_prediction: Any = importlib.import_module("plan_prediction")
memory: Any = importlib.import_module("memory")


def request(*sizes: int, step_s: float = 0.01) -> Generation:
    """A request that got `sizes` tokens, step by step; the first reads the prompt."""
    steps = []
    for number, size in enumerate(sizes, start=1):
        steps.append(Step(number * step_s, tuple(range(size)), "", "x"))
    return Generation(tuple(steps))


def test_steps_that_the_end_could_cut_are_not_counted() -> None:
    # 1, then 3 (until 4), 2 (until 6), and at 6 of 8 a step of 3 has no room.
    found = request(1, 3, 2, 2)
    assert decoding.decode_counts(found, max_tokens=8, reach=3) == (5, 2)
    assert decoding.decode_counts(found, max_tokens=9, reach=3) == (7, 3)


def test_acceptance_length_and_its_interval() -> None:
    assert decoding.acceptance_length([(30, 20), (15, 10)]) == (1.5, 0.0)
    rate, width = decoding.acceptance_length([(30, 20), (10, 10)])
    assert rate == pytest.approx(4 / 3)
    # Residuals are 10/3 and -10/3; two requests, thirty steps.
    assert width == pytest.approx(1.96 * np.sqrt(2 * 2 * (10 / 3) ** 2) / 30)
    with pytest.raises(ValueError, match="no request made a decode step"):
        decoding.acceptance_length([(0, 0)])


def test_seconds_of_a_step_leave_out_reading_prompts() -> None:
    slow = Step(1.0, (1,), "", "x")
    one = Generation((slow, Step(1.5, (1,), "", "x"), Step(2.0, (1,), "", "x")))
    two = Generation((Step(1.5, (1,), "", "x"), Step(2.0, (1,), "", "x")))
    assert decoding.step_seconds(Batch(2.0, 3, (one, two))) == 0.5
    assert decoding.decode_speed(one) == 2.0
    with pytest.raises(ValueError, match="too short to time"):
        decoding.step_seconds(Batch(1.0, 1, (Generation((slow,)),)))


def test_more_rows_are_never_taken_to_be_faster() -> None:
    curve = decoding.latency_curve({1: 2.0, 4: 1.5, 8: 3.0})
    assert (curve(1), curve(4), curve(8)) == (2.0, 2.0, 3.0)


def test_predicted_against_measured() -> None:
    rates = AcceptanceStats(np.array([[0.5, 0.25]]))
    policy = optimal_policy(rates, LatencyCurve.constant(), 4).policy
    # Every place: the token after next is the first candidate.
    places = torch.zeros(40, 1, dtype=torch.long)
    found = Measurement(places, torch.zeros(40).long(), Reliability.zeros(1))
    rounds = [[request(1, 1, *[2] * 6, step_s=0.1)]] * 2
    cell = prediction.cell_of(
        policy, 0.0, rates, found, LatencyCurve.constant(0.1), rounds, 100
    )
    # State 1 keeps a prompt token on the root and on each of one or two candidates.
    tau = cell["predicted"]["tokens_per_step"]
    assert 1.4 < tau <= 1.75
    assert cell["predicted"]["tokens_per_s"] == pytest.approx(10 * tau)
    # One step of one token, seven of two; rounds of equal text count once.
    assert cell["measured"]["steps"] == 7
    assert cell["measured"]["tokens_per_step"] == pytest.approx(13 / 7, abs=1e-4)
    assert cell["walked"]["tokens_per_step"] > 1.9
    ratio = cell["predicted_over_measured"]["tokens_per_step"]
    assert ratio == pytest.approx(tau / (13 / 7), abs=1e-3)


def test_lengths_are_those_of_the_calibration() -> None:
    args = prediction.parse_arguments([])
    source = {"settings": {"prompt_length": 32, "continuation": 48}}
    stats = AcceptanceStats(np.array([[0.5]]), source)
    lengths = {"prompt_length": 32, "continuation": 48}
    assert prediction.calibration(stats, args) == lengths
    assert prediction.calibration(AcceptanceStats(np.array([[0.5]])), args) == {
        "prompt_length": 96,
        "continuation": 160,
    }
    with pytest.raises(SystemExit):
        prediction.parse_arguments(["--rows", "1"])


def test_guessing_is_compared_with_plain_steps_of_the_same_round() -> None:
    # One candidate that is right half of the time, where a step with guesses takes
    # 1.2 times as long as one without.
    tree = SparseTree((0,), (0,), (1, 1), 1)
    acceptance = AcceptanceModel.of(AcceptanceStats(np.array([[0.5]])))
    report = {
        "plan": TreePlan.of(TreePolicy((tree, tree))).to_dict(),
        "acceptance": acceptance.to_dict(),
        "profile": LatencyProfile((1,), (1, 8), ((0.1, 0.12),), {}).to_dict(),
        "plan_changes": 0,
        "timings": [StepTiming(1, ((1.0, 8), (4.0, 8)), 0.1, 0.12, 0.1)._asdict()],
    }
    rows = tree.num_rows
    step_s = 0.1 + 0.02 * (rows - 1) / 7

    def of(*sizes: int, step_s: float) -> list[Batch]:
        one = request(*sizes, step_s=step_s)
        return [Batch(one.seconds, len(sizes), (one,))]

    # The machine is half as fast in the second round, whose ratio stays the same.
    rounds = [
        plan_prediction.Round(
            of(1, 2, 1, 2, 1, step_s=slow * step_s), of(*[1] * 5, step_s=slow * 0.1)
        )
        for slow in (1, 2)
    ]
    cell = plan_prediction.cell_of("learnt", 0.0, 1, report, rounds, 100, 200)
    assert cell["expected"]["tokens_per_step"] == pytest.approx(1.5)
    assert cell["measured"]["tokens_per_step"] == pytest.approx(1.5)
    assert cell["measured"]["over_plain"]["min"] == pytest.approx(
        0.15 / step_s, abs=1e-4
    )
    assert cell["measured"]["over_plain"]["max"] == pytest.approx(
        0.15 / step_s, abs=1e-4
    )
    assert cell["measured"]["bound"] == pytest.approx(0.15 / step_s, abs=1e-4)
    assert cell["expected_over_measured"]["over_plain"] == pytest.approx(1)
    assert cell["over_plain_of_bound"] == pytest.approx(1)
    (timing,) = cell["timings"]
    assert (timing["rows"], timing["steps"], timing["bare"]) == (2.5, 16, 8)


def engine(weights: int, blocks: int, used: int, process: int) -> dict[str, Any]:
    return {
        "weights": weights,
        "kv_blocks": blocks,
        "kv_block_tokens": 16,
        "kv_blocks_used": used,
        "loaded": {"process": process},
        "after_requests": {"process": process + 5},
    }


def test_memory_is_compared_start_by_start() -> None:
    plain = [engine(1000, 50, 8, 100), engine(1000, 50, 8, 120)]
    ppd = [engine(1006, 49, 10, 101), engine(1006, 49, 10, 123)]
    added = memory.compared(plain, ppd)
    assert added["weights"] == 6
    assert added["kv_blocks_fewer"] == 1
    assert added["kv_tokens_used_more"] == 32
    assert added["process"]["loaded"] == {"median": 2, "min": 1, "max": 3}
    assert added["process_varies_by"] == 20


def test_shared_tensors_count_once(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.one = torch.nn.Parameter(torch.zeros(3, 4))
    model.two = model.one
    model.register_buffer("table", torch.zeros(2, 4, dtype=torch.bfloat16))
    assert memory.model_bytes(model) == 3 * 4 * 4 + 2 * 4 * 2
    with pytest.raises(ValueError, match="no safetensors"):
        memory.checkpoint_size(tmp_path)
    save_file({"a": torch.zeros(3, 4)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(5)}, tmp_path / "2.safetensors")
    parameters, size = memory.checkpoint_size(tmp_path)
    assert parameters == 17
    assert size > 4 * 17


def test_usage_of_the_kv_cache_is_a_metric() -> None:
    metrics = [SimpleNamespace(name="vllm:kv_cache_usage_perc", value=0.25)]
    assert memory.kv_usage([*metrics, SimpleNamespace(name="other", value=1)]) == 0.25
    with pytest.raises(RuntimeError, match="adapt this benchmark"):
        memory.kv_usage([])
