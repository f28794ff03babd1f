"""What a worker counts of its traffic, step by step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.engine.conftest import PROMPTS
from vllm_ppd.engine.v1.online import OnlineTrees
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.trees.ngram import match_ngrams

NO_CHAINS = np.full((2, 8), -1)
TOKENS = np.zeros((2, 64), dtype=np.int64)


class Steps:
    """A worker whose requests are looked at after every step."""

    def __init__(self) -> None:
        evidence = AcceptanceModel.load(PROMPTS / "evidence.json")
        settings = SimpleNamespace(evidence=lambda: evidence)
        # Whose plan has guesses for two requests and fewer.
        drafter = SimpleNamespace(
            plan_settings=settings,
            first_tree=lambda running: int(running < 3),
            context=1,
        )
        self.online = OnlineTrees(drafter, ranks=2)
        self._ends: dict[str, int] = {}
        self.chains, self.tried = NO_CHAINS, ()

    def step(self, classes: dict[str, int], new_tokens: int = 1) -> None:
        """A step without guesses; `classes` by request."""
        self.online.after_step(len(classes), None, None)
        ends = [self._ends.get(name, 10) + new_tokens for name in classes]
        self._ends = dict(zip(classes, ends, strict=True))
        self.online.after_match(
            list(classes),
            np.array(list(classes.values())),
            self.chains[: len(classes)],
            np.array([name in self.tried for name in classes]),
            np.array(ends),
            TOKENS[: len(classes)],
        )

    @property
    def moves(self) -> list[list[list[float]]]:
        """After steps that accepted nothing, and after others."""
        return self.online._learner._moves.tolist()


def test_moves_between_match_classes_are_counted_without_guesses_too():
    steps = Steps()
    steps.step({"a": 0, "b": 1})
    assert not np.any(steps.moves)
    steps.step({"a": 0, "b": 2}, new_tokens=1)
    steps.step({"a": 1, "b": 2}, new_tokens=2)
    expected = [[[1, 0, 0], [0, 0, 1], [0, 0, 0]], [[0, 1, 0], [0, 0, 0], [0, 0, 1]]]
    assert steps.moves == expected
    # A request that got no token has not moved.
    steps.step({"a": 1, "b": 2}, new_tokens=0)
    assert steps.moves == expected


def test_a_text_that_ends_is_followed_by_one_that_begins():
    steps = Steps()
    steps.step({"a": 2, "b": 1})
    steps.step({"b": 1, "c": 0})
    # "b" is counted with the next look at the same requests. Whether the last step of
    # "a" accepted anything is not known.
    half = [[0, 0, 0], [0, 0, 0], [0.5, 0, 0]]
    assert steps.moves == [half, half]
    # Nobody in its place.
    steps.step({"b": 1})
    assert steps.moves == [half, half]


def test_steps_between_looks_are_no_moves():
    steps = Steps()
    steps.step({"a": 0})
    steps.online.after_step(1, None, None)
    steps.step({"a": 2})
    assert not np.any(steps.moves)


def test_a_chain_is_counted_once_by_its_walk_or_by_what_was_written():
    steps = Steps()
    # Eight tokens of which the first three are right.
    steps.chains = np.array([[0, 0, 0, 5, 5, 5, 5, 5]] * 2)
    steps.tried = "b"
    steps.step({"a": 1, "b": 2})
    for _ in range(8):
        steps.step({"a": 0, "b": 0})
    learner = steps.online._learner
    first, end = learner._firsts[2:4]
    tries = learner._tries[first:end].reshape(-1, 8)
    hits = learner._hits[first:end].reshape(-1, 8)
    assert tries.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [0] * 8]
    assert hits.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8]


def test_loads_that_are_worth_a_search():
    online = Steps().online
    for running, context, count in ((1, 9, 2), (4, 512, 40), (4, 513, 20), (3, 1, 38)):
        online._drafter.context = context
        for _ in range(count):
            online.after_step(running, None, None)
    # Contexts are told apart by powers of two.
    assert online._usual_loads() == [(3, 1), (4, 512), (4, 1024)]


def test_time_passes_where_the_plan_has_no_guesses():
    online = Steps().online
    for _ in range(256):
        online.after_step(2, None, None)
    assert online._learner.observations == 0
    for _ in range(256):
        online.after_step(3, None, None)
    assert online._learner.observations == 4 * 3


def glance(online: OnlineTrees, names: list[str], ends: list[int]) -> None:
    """Texts of the same eight tokens over and over, of which 16 are the prompt."""
    tokens = np.tile(np.arange(8), (len(names), 40))
    starts = np.full(len(names), 16)
    online.glance(names, tokens, starts, np.array(ends), 4096, match_ngrams)


def test_text_written_without_guesses_says_what_they_would_have_done():
    online = Steps().online
    for _ in range(256):
        online.after_step(1, None, None)
    assert online.glances_now
    glance(online, ["a"], [96])
    # The last 64 tokens hold seven steps of nine; two begin anywhere and two are the
    # last that are not wholly known.
    learner = online._learner
    first, end = learner._firsts[2:4]
    tries = learner._tries[first:end].reshape(-1, 8)
    assert tries.tolist() == [[0] * 8, [5.0] * 8]
    assert (learner._hits[first:end] == learner._tries[first:end]).all()
    assert learner._moves[1].tolist() == [[0] * 3, [0] * 3, [0, 0, 5]]
    assert learner.observations == 5 * 9
    # "a" ended in class 2 and "b" begins with its prompt, so does "c": 45 tokens of 128
    # were counted, then 45 of 192.
    glance(online, ["b"], [17])
    glance(online, ["c"], [17])
    assert learner._moves[:, 2, 2].sum() == pytest.approx(5 + 45 / 128 + 45 / 192)


def test_requests_are_looked_at_in_turn():
    online, seen = Steps().online, []

    def match(token_ids, ends, context):
        if len(ends) < 20:
            seen.append(token_ids[:, 0].tolist())
        return match_ngrams(token_ids, ends, context)

    tokens = np.arange(20)[:, None] + np.zeros((20, 96), dtype=int)
    starts, ends = np.full(20, 16), np.full(20, 17)
    for _ in range(5):
        online._steps += 256
        online.glance([f"r{i}" for i in range(20)], tokens, starts, ends, 96, match)
    assert {len(some) for some in seen} == {4, 8}
    assert {row for some in seen for row in some} == set(range(20))
