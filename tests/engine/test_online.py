"""What a worker counts of its traffic, step by step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tests.engine.conftest import PROMPTS
from vllm_ppd.engine.online import OnlineTrees
from vllm_ppd.evidence import Evidence

NO_CHAINS = np.full((2, 8), -1)
TOKENS = np.zeros((2, 64), dtype=np.int64)


class Steps:
    """A worker whose requests are looked at after every step."""

    def __init__(self) -> None:
        evidence = Evidence.load(PROMPTS / "evidence.json")
        settings = SimpleNamespace(evidence=lambda: evidence)
        self.online = OnlineTrees(SimpleNamespace(plan_settings=settings), ranks=2)
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
    for running, count in ((1, 2), (4, 60), (3, 38)):
        for _ in range(count):
            online.after_step(running, None, None)
    assert online._usual_loads() == [3, 4]


def test_time_passes_where_nobody_guesses():
    online = Steps().online
    for _ in range(256):
        online.after_step(3, None, None)
    assert online._learner.observations == 4 * 3
