"""What a machine is measured with: made-up requests, and the grid of loads and rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from vllm_ppd.engine.made_up_requests import blocks_of, scheduled, tree_of_rows

from vllm_ppd.engine import measure as grid
from vllm_ppd.engine.v1 import measure_context


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


def test_blocks_leave_out_the_null_block_and_are_shared_where_few():
    def config(num_blocks):
        groups = [
            SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size))
            for size in (16, 32)
        ]
        return SimpleNamespace(kv_cache_groups=groups, num_blocks=num_blocks)

    assert blocks_of(config(100), 0, 40) == ([1, 2, 3], [1, 2])
    assert blocks_of(config(100), 2, 40) == ([7, 8, 9], [5, 6])
    assert blocks_of(config(5), 1, 40) == ([4, 1, 2], [3, 4])


def test_an_output_counts_its_tokens():
    output = scheduled(tokens={"a": 3, "b": 1}, drafts={"a": [-1, -1]})
    assert output.total_num_scheduled_tokens == 4
    assert output.scheduled_spec_decode_tokens == {"a": [-1, -1]}
    assert scheduled(finished={"a"}).finished_req_ids == {"a"}


class Clockwork:
    """A machine that needs a second per step and a hundredth more per row."""

    def __init__(self, requests, counts):
        self.requests, self.counts = requests, counts
        self.visited: list[int] = []
        self.closed = False

    def seconds(self, count):
        self.visited.append(count)
        # One step in three is far too slow; the median does not see it.
        return [1 + self.requests * count / 100] * 2 + [99.0]

    def bare_seconds(self):
        return [seconds + 0.001 for seconds in self.seconds(1)]

    def close(self):
        self.closed = True


class Visits(list[Clockwork]):
    """Makes them, and knows all that were made."""

    def __call__(self, requests, counts):
        self.append(Clockwork(requests, counts))
        return self[-1]


def test_all_rows_of_a_load_are_visited_in_turn(monkeypatch):
    monkeypatch.setattr(grid, "agreed", lambda answer: answer)
    visits = Visits()
    limits = SimpleNamespace(max_num_batched_tokens=32, max_num_seqs=5)
    rows = [1, 4, 8, 16]
    profile = grid.measure_grid(visits, rows, limits, {"of": "clockwork"}, quiet=True)
    # Steps of more than 32 rows are left out.
    assert [(v.requests, v.visited) for v in visits] == [
        *((1, [1, 4, 8, 16]), (2, [1, 4, 8, 16]), (4, [1, 4, 8])),
    ] * 3
    assert all(visit.closed and visit.visited == visit.counts for visit in visits)
    assert (profile.requests, profile.rows) == ((1, 2, 4), (1, 4, 8, 16))
    assert profile.key == {"of": "clockwork"}
    expected = 1 + np.outer([1, 2, 4], rows) / 100
    # Where nothing was measured rows cost in proportion.
    expected[2, 3] = 2 * expected[2, 2]
    np.testing.assert_allclose(profile.seconds, expected)


def test_steps_without_guesses_are_visited_too_where_they_are_no_plain_ones(
    monkeypatch,
):
    monkeypatch.setattr(grid, "agreed", lambda answer: answer)
    visits = Visits()
    limits = SimpleNamespace(max_num_batched_tokens=32, max_num_seqs=2)
    profile = grid.measure_grid(
        visits, [1, 4], limits, {}, quiet=True, bare=Clockwork.bare_seconds
    )
    assert [v.visited for v in visits] == [[1, 1, 4]] * 6
    np.testing.assert_allclose(profile.bare, (1.011, 1.021))
    np.testing.assert_allclose(profile.seconds, ((1.01, 1.04), (1.02, 1.08)))


def test_a_slow_machine_is_visited_once_and_visits_end_when_they_fail(monkeypatch):
    monkeypatch.setattr(grid, "agreed", lambda answer: True)
    limits = SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=2)
    visits = Visits()
    grid.measure_grid(visits, [1, 2], limits, {}, quiet=True)
    assert [visit.requests for visit in visits] == [1, 2]

    def broken(count):
        raise RuntimeError("out of memory")

    def visit_that_fails(requests, counts):
        visits.append(Clockwork(requests, counts))
        visits[-1].seconds = broken
        return visits[-1]

    with pytest.raises(RuntimeError, match="out of memory"):
        grid.measure_grid(visit_that_fails, [1, 2], limits, {}, quiet=True)
    assert visits[-1].closed


class LongClockwork(Clockwork):
    """And a millisecond per thousand tokens of context and request; trees two, and a
    tenth more per row."""

    def __init__(self, requests, counts, context, length):
        super().__init__(requests, counts)
        self.asked, self.context = context, min(context, length)

    def seconds(self, count):
        each = 1e-6 if count == 1 else 2e-6 + 1e-7 * count
        added = self.requests * self.context * each
        return [seconds + added for seconds in super().seconds(count)]


def test_contexts_are_compared_next_to_each_other(monkeypatch):
    monkeypatch.setattr(measure_context, "agreed", lambda answer: answer)
    visits: list[LongClockwork] = []

    def visit_of(length):
        def visit(requests, counts, context):
            visits.append(LongClockwork(requests, counts, context, length))
            return visits[-1]

        return visit

    rows = [1, 2, 4, 8, 16, 32]
    cost = measure_context.measure_context_cost(visit_of(9999), rows, 64)
    assert cost.context == 128
    assert (cost.plain, cost.tree, cost.row) == pytest.approx((1e-6, 2e-6, 1e-7))
    # The first only said how long contexts can be.
    asked = [(visit.requests, visit.asked) for visit in visits[1:]]
    assert asked == [(1, 128), (1, 4096), (8, 128), (8, 4096)] * 3
    assert all(visit.closed and visit.visited == [1, 4, 16] for visit in visits[1:])

    # A model with room for fewer tokens, steps with room for fewer rows.
    shorter = measure_context.measure_context_cost(visit_of(900), rows[:3], 2)
    assert (shorter.plain, shorter.tree + 4 * shorter.row) == pytest.approx(
        (1e-6, 2.4e-6)
    )
    assert {(v.requests, v.context) for v in visits[-6:]} == {(1, 128), (1, 900)}
    assert measure_context.measure_context_cost(visit_of(400), rows, 64) is None
    assert measure_context.measure_context_cost(visit_of(9999), [1, 2], 64) is None
