"""What a machine is measured with: made-up requests, and the grid of loads and rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_ppd.engine import measure
from vllm_ppd.engine.made_up_requests import MadeUpRequests, blocks_of
from vllm_ppd.engine.v1.measure import tree_of_rows
from vllm_ppd.search.latency import LatencyProfile, cache_file
from vllm_ppd.trees.menu import MenuEntry, TreeMenu
from vllm_ppd.trees.tree import TreePolicy, chain_tree


@pytest.mark.parametrize("num_prompt_tokens", [1, 3])
@pytest.mark.parametrize("num_ept", [1, 2, 4])
def test_a_tree_of_so_many_rows(num_prompt_tokens, num_ept):
    for rows in range(1, 129):
        tree = tree_of_rows(rows, num_prompt_tokens, num_ept)
        assert tree.num_rows == rows
        assert max(tree.prompts) <= num_prompt_tokens
    assert max(tree.ranks) == 1
    tree = tree_of_rows(7, 3, 1)
    assert (tree.parents, tree.ranks) == ((0, 0, 1, 1), (0, 1, 0, 1))
    assert tree.prompts == (1, 1, 0, 0, 0)


def kv_cache(num_blocks: int) -> SimpleNamespace:
    specs = [SimpleNamespace(block_size=size) for size in (16, 32)]
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=num_blocks)


def test_blocks_leave_out_the_null_block_and_are_shared_where_few():
    assert blocks_of(kv_cache(100), 0, 40) == ([1, 2, 3], [4, 5])
    assert blocks_of(kv_cache(100), 2, 40) == ([11, 12, 13], [14, 15])
    assert blocks_of(kv_cache(8), 1, 40) == ([6, 7, 1], [2, 3])


def made_up(num_running: int, rows: int, steps: int, length: int) -> MadeUpRequests:
    model = SimpleNamespace(max_model_len=length, get_vocab_size=lambda: 50)
    limits = SimpleNamespace(max_num_batched_tokens=8)
    config = SimpleNamespace(model_config=model, scheduler_config=limits)
    runner = SimpleNamespace(vllm_config=config, kv_cache_config=kv_cache(100))
    return MadeUpRequests(runner, num_running, rows, steps)


def test_requests_arrive_decode_and_leave():
    requests = made_up(3, rows=4, steps=4, length=500)
    first, second = requests.prefill()
    # No more than 8 rows in a step, and 4 tokens of each prompt are read.
    assert [len(step.scheduled_new_reqs) for step in (first, second)] == [2, 1]
    assert first.num_scheduled_tokens == dict.fromkeys(requests.ids[:2], 4)
    new = second.scheduled_new_reqs[0]
    assert (new.num_computed_tokens, len(new.prompt_token_ids)) == (124, 128)
    assert len(new.block_ids[0]) == -(-(128 + 4 * 4 + 1) // 16)
    one, _, three = requests.ids
    requests.advance(one, 3)
    step = requests.decode({one: [-1] * 3, three: []})
    assert step.num_scheduled_tokens == {one: 4, requests.ids[1]: 1, three: 1}
    assert step.total_num_scheduled_tokens == 6
    assert step.scheduled_spec_decode_tokens == {one: [-1] * 3}
    assert step.num_spec_tokens_to_schedule == 3
    assert step.scheduled_cached_reqs.num_computed_tokens == [131, 128, 128]
    assert step.scheduled_cached_reqs.num_output_tokens == [4, 1, 1]
    assert requests.finish().finished_req_ids == set(requests.ids)


def test_requests_fit_a_short_model():
    for length in (8, 30, 100):
        for rows in (1, 3, 6):
            requests = made_up(1, rows, steps=9, length=length)
            (step,) = requests.prefill()
            context = len(step.scheduled_new_reqs[0].prompt_token_ids)
            assert 1 <= requests.num_steps <= 9 and 1 <= context <= 128
            assert context + requests.num_steps * rows + 1 <= length


class Clockwork:
    """A machine that needs a second per step and a hundredth more per row.

    Its clock runs while it is measured.
    """

    row_counts: list[int] | None = None

    def __init__(self, max_num_running: int, max_step_rows: int, now: list[float]):
        self.max_num_running, self.max_step_rows = max_num_running, max_step_rows
        self.now = now
        self.cells: list[tuple[int, int]] = []
        self.finished = False

    def seconds(self, num_running: int, rows: int) -> list[float]:
        self.cells.append((num_running, rows))
        self.now[0] += 1.0
        # One step in three is far too slow; the median does not see it.
        return [1 + num_running * rows / 100] * 2 + [99.0]

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def clock(monkeypatch, tmp_path) -> list[float]:
    """The seconds that `measure` sees; one rank, and a cache of its own."""
    now = [0.0]
    group = SimpleNamespace(is_first_rank=True, world_size=1)
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(measure, "get_tp_group", lambda: group)
    monkeypatch.setattr(measure, "get_world_group", lambda: group)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return now


def settings(seconds: float = 1e9, needed: bool = True) -> SimpleNamespace:
    rows = 8
    policy = TreePolicy((chain_tree(1, (1, rows - 3)),) * rows)
    menu = TreeMenu((MenuEntry((policy,)),))
    assert menu.max_rows == rows
    return SimpleNamespace(
        measure=needed,
        measure_seconds=seconds,
        profile_key={"of": "clockwork"},
        tree_menu=lambda: menu,
    )


COARSE = [(1, 1), (1, 4), (1, 8), (4, 1), (4, 4), (4, 8), (2, 1), (2, 4), (2, 8)]


def test_coarse_points_come_first_and_all_are_filed(clock):
    machine = Clockwork(5, 24, clock)
    profile = measure.measured_profile(settings(), machine)
    # Steps of more than 24 rows are left out.
    coarse = [cell for cell in COARSE if cell != (4, 8)]
    assert machine.cells[: len(coarse)] == coarse
    full = [(1, n) for n in (1, 2, 4, 8)] + [(4, n) for n in (1, 2, 4)]
    full += [(2, n) for n in (1, 2, 4, 8)]
    assert machine.cells[len(coarse) :] == full * 2
    assert machine.finished
    assert (profile.num_running, profile.rows) == ((1, 2, 4), (1, 2, 4, 8))
    expected = 1 + np.outer([1, 2, 4], profile.rows) / 100
    # Where nothing was measured rows cost in proportion.
    expected[2, 3] = 2 * expected[2, 2]
    np.testing.assert_allclose(profile.seconds, expected)
    assert LatencyProfile.load(cache_file(profile.key)) == profile


@pytest.mark.parametrize(
    ("budget", "cells", "loads"), [(0, 3, (1,)), (4.5, 5, (1, 4)), (3.5, 4, (1,))]
)
def test_measuring_ends_with_its_budget(clock, budget, cells, loads):
    machine = Clockwork(5, 64, clock)
    profile = measure.measured_profile(settings(budget), machine)
    assert machine.cells == COARSE[:cells]
    # A load of which the plain step alone was measured is left out.
    assert profile.num_running == loads
    np.testing.assert_allclose(profile.seconds[0], 1 + np.array([1, 2, 4, 8]) / 100)


def test_only_rows_that_the_runner_can_run(clock):
    machine = Clockwork(1, 64, clock)
    machine.row_counts = [1, 5]
    profile = measure.measured_profile(settings(), machine)
    assert profile.rows == (1, 5) and set(machine.cells) == {(1, 1), (1, 5)}


def test_all_ranks_go_by_the_first(clock, monkeypatch):
    told: list = []
    rank = SimpleNamespace(is_first_rank=False, world_size=2)

    def broadcast(answer, src):
        assert src == 0
        if isinstance(answer, dict):
            return LatencyProfile((1,), (1, 2), ((0.1, 0.2),), {}).to_dict()
        told.append(answer)
        # This rank's own clock says that time is up; the first rank's does not yet.
        return len(told) < 4

    rank.broadcast_object = broadcast
    monkeypatch.setattr(measure, "get_tp_group", lambda: rank)
    monkeypatch.setattr(measure, "get_world_group", lambda: rank)
    machine = Clockwork(4, 64, clock)
    # It measures although it has a profile, for the first rank has none.
    profile = measure.measured_profile(settings(needed=False), machine)
    assert profile.seconds == ((0.1, 0.2),)
    assert told == [False, False] and machine.cells == COARSE[:3]
    # Only the first rank keeps the file.
    assert not cache_file({"of": "clockwork"}).exists()


def test_one_of_several_data_parallel_engines_keeps_its_profile(clock):
    for keep in (False, True):
        machine = Clockwork(2, 64, clock)
        profile = measure.measured_profile(settings(), machine, keep=keep)
        assert cache_file(profile.key).exists() == keep


def test_runners_are_left_as_they_were_if_measuring_fails(clock):
    machine = Clockwork(4, 64, clock)
    machine.seconds = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        measure.measured_profile(settings(), machine)
    assert machine.finished


def test_nothing_is_measured_unless_it_has_to_be(clock):
    machine = Clockwork(4, 64, clock)
    assert measure.measured_profile(settings(needed=False), machine) is None
    assert machine.cells == []
