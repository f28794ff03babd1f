"""Speculation is given up where it does not pay, and taken up again where it does."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import median

import numpy as np
import pytest

from vllm_ppd.adaptive.guess_tally import GuessTally
from vllm_ppd.adaptive.load_guard import LoadGuard
from vllm_ppd.adaptive.prompt_cost import seconds_per_row
from vllm_ppd.adaptive.speed_look import Look, MeanStep, TimedStep
from vllm_ppd.adaptive.step_timing import StepTiming, corrected
from vllm_ppd.search.latency import LatencyProfile


class World:
    """An engine whose steps take some time and bring some tokens."""

    def __init__(self, gain: float, seed: int = 0):
        self.now, self.gain = 0.0, gain
        self.guard = LoadGuard(clock=lambda: self.now)
        self.tokens = [1, 2, 3]
        self._random = random.Random(seed)
        self._guessing = False

    def run(
        self, steps: int, running: int = 4, prompt_rows: int = 0, new: int = 0
    ) -> float:
        """Share of the steps that had guesses. A prompt's row takes 0.01 s."""
        guessed = 0
        for _ in range(steps):
            guessing = self._guessing
            guessed += guessing
            rows = running * (3 if guessing else 1)
            tokens = running
            if guessing:
                tokens = sum(self._random.choice(self.tokens) for _ in range(running))
            # DraftInputs bring two tokens in the mean.
            self.now += 2 / self.gain if guessing else 1.0
            self.now += 0.01 * prompt_rows
            if self._random.random() < 0.05:
                self.now += 10.0
            self._guessing = self.guard.next_step(
                running, tokens, rows, prompt_rows, new
            )
        return guessed / steps


@pytest.mark.parametrize(("gain", "least", "most"), [(1.3, 0.9, 1.0), (0.8, 0.0, 0.15)])
def test_what_pays_is_done(gain, least, most):
    for seed in range(5):
        world = World(gain, seed)
        world.run(1000)
        assert least <= world.run(4000) <= most


def test_rare_guesses_are_judged_by_what_they_cost():
    """One step in four has guesses, takes three times as long and brings one token
    more: the median step is a plain one and would show nothing but the gain."""
    now, guessing, share = 0.0, True, []
    guard = LoadGuard(clock=lambda: now)
    for step in range(6000):
        dear = guessing and step % 4 == 0
        now += 3.0 if dear else 1.0
        share.append(guessing)
        guessing = guard.next_step(2, 2 + 2 * dear, 2 + 6 * dear)
    assert sum(share[2000:]) < 0.15 * 4000


def test_probes_grow_rare():
    world = World(1.5)
    early = 1 - world.run(1500)
    world.run(20_000)
    assert 1 - world.run(8000) < 0.01 < early < 0.2


@pytest.mark.parametrize("gain", [0.5, 0.7, 1.6, 2.5])
def test_looks_at_the_slower_way_cost_one_per_cent(gain):
    world = World(gain)
    # Until both have been looked at, and for as long as guesses are given.
    world.run(250)
    seconds = {True: 0.0, False: 0.0}
    for _ in range(5000):
        guessed = bool(world.run(1))
        seconds[guessed] += 2 / gain if guessed else 1.0
    lost = seconds[gain < 1] * (1 - min(gain, 1 / gain))
    assert lost <= 0.012 * sum(seconds.values())


def test_it_comes_back_when_the_text_changes():
    world = World(0.8)
    world.run(1000)
    world.gain = 1.6
    world.run(12_000)
    assert world.run(2000) > 0.9


def test_loads_are_told_apart():
    world = World(0.8)
    world.run(2000, running=16)
    assert world.run(500, running=20) < 0.2
    assert world.run(15, running=1) > 0.9
    # Above a load at which it does not pay it is not tried at once, but soon.
    assert world.run(200, running=40) < 0.1
    world.gain = 1.5
    world.run(600, running=40)
    assert world.run(500, running=40) > 0.9


def test_one_request_s_guesses_are_judged_by_many_texts():
    """Every other text cannot be guessed at all, and a look sees one or two: guesses
    pay, and looks alone would say now this, now that."""
    kept = []
    for seed in range(10):
        world, chosen = World(1.25, seed), random.Random(seed)
        for _ in range(70):
            world.tokens = chosen.choice(([1], [2, 3, 4]))
            kept.append(world.run(60, running=1))
    assert sum(kept) > 0.8 * len(kept)


def test_one_lucky_look_is_not_enough():
    world = World(0.9)
    world.run(1000)
    load = world.guard._loads[2]
    for _ in range(3):
        # For once, plain steps take long.
        while load.look is None:
            world.now += 0.5
            world.run(1)
        while load.look is not None:
            world.now += 0 if load.guessing else 0.5
            world.run(1)
        assert load.ratios[-1] > 1.1 and not load.speculating
        # Soon looked at again.
        assert world.run(150) < 0.6
        assert load.ratios[-1] < 1 and not load.speculating


def test_a_look_sees_both_ways_at_the_same_speed_of_the_machine():
    world = World(1.15)
    world.run(30)
    load = world.guard._loads[2]
    while load.look is None:
        world.run(1)
    # Half as slow again at its end as at its begin.
    slower = 0.0
    while load.look is not None:
        guessing = load.guessing
        world.run(1)
        world.now += slower * (2 / 1.15 if guessing else 1.0)
        slower += 0.5 / 90
    assert load.ratios[-1] == pytest.approx(1.15, rel=0.1)


@pytest.mark.parametrize(("gain", "least", "most"), [(1.2, 0.9, 1.0), (0.85, 0.0, 0.2)])
def test_a_full_server_whose_requests_come_and_go(gain, least, most):
    """Nearly every step reads a prompt or two, which take as long as the step."""
    world = World(gain)
    share = 0.0
    for turn in range(1000):
        prompts = turn % 7 % 3
        here = world.run(1, 62 + turn % 3, prompt_rows=100 * prompts, new=prompts)
        share = 0.99 * share + 0.01 * here
    assert least <= share <= most
    # 62 to 64 are one range.
    timings = world.guard.timings
    assert len({timing.requests for timing in timings}) == 1
    assert median(t.plain_s for t in timings) == pytest.approx(1.0)
    assert median(t.guessing_s for t in timings) == pytest.approx(2 / gain)


def test_a_look_at_other_loads_says_nothing():
    look = Look(True, [TimedStep(2.0, 32, 2.0, 0, 16)] * 16)
    for _ in range(16):
        look.add(TimedStep(1.0, 13, 1.0, 0, 13))
    assert not look.says_something
    for _ in range(48):
        look.add(TimedStep(1.0, 16, 1.0, 0, 16))
    assert look.says_something


def test_steps_of_a_look_are_compared_at_one_load():
    """Half of the plain steps came when most requests had ended."""
    look = Look(True, [TimedStep(2.0, 32, 2.0, 0, 16)] * 16)
    for running in [16, 8] * 8:
        look.add(TimedStep(1.0, running, 1.0, 0, running))
    assert look.says_something
    assert look.ratio(0.0) == pytest.approx(1.0)


def test_far_too_slow_guesses_of_many_requests_end_with_the_first_block():
    for running, blocks in ((64, 1), (4, 5)):
        look = Look(True, [TimedStep(3.0, 2 * running, 3.0, 0, running)] * 16)
        ended = 0
        while True:
            seconds, tokens = (3.0, 2) if look.guessing else (1.0, 1)
            for _ in range(16):
                step = TimedStep(seconds, tokens * running, tokens, 0, running)
                look.add(step)
            ended += 1
            if look.ends(0.0):
                break
        assert ended == blocks


def test_guesses_of_few_requests_are_not_given_up_at_once():
    for running, steps in ((1, 900), (4, 200)):
        world = World(0.95)
        world.run(steps, running)
        assert world.guard._loads[(running - 1).bit_length()].speculating
        world.run(600, running)
        assert world.run(1000, running) < 0.2


def test_what_guesses_brought_at_other_rows_than_the_clock_saw():
    tally = GuessTally()
    for _ in range(1100):
        tally.add(2, 5, 8)
    assert tally.missing(0.0) == tally.missing(0.5) == 0
    tally = GuessTally(100.0, 250.0, 400.0)
    assert tally.missing(-1.0) == tally.missing(0.1) > tally.missing(0.2) > 0
    assert tally.missing(0.5) == 0
    # 2.5 tokens in steps of 4 rows; those of 3 rows took 1.5 times a plain one.
    guessing = MeanStep(3.0, ((2.0, 8), (4.0, 8)), 0.0)
    plain = MeanStep(2.0, ((1.0, 16),), 2.0)
    assert tally.ratio(guessing, plain) == pytest.approx(2.5 / 1.75)
    # The last ones count more than those of long ago.
    for _ in range(10_000):
        tally.add(1, 1, 1)
    assert tally.ratio(guessing, plain) == pytest.approx(1.0, abs=0.1)


def test_looks_that_say_nothing_grow_rare():
    world = World(1.2)
    world.run(100, running=64)
    looked = []
    for _ in range(6000):
        load = world.guard._load(6)
        # Plain steps come when there are few requests, others when there are many.
        world.run(1, 64 if load.guessing else 34)
        looked.append(load.look is not None)
    assert sum(looked[:1000]) > 50 > sum(looked[5000:])


def test_a_new_plan_is_tried_soon_and_not_at_once():
    world = World(0.8)
    world.run(9000)
    # What does not pay stays off, however often the plan changes ...
    guessed = []
    for _ in range(20):
        world.guard.renew()
        guessed.append(world.run(600))
    assert sum(guessed) / len(guessed) < 0.2
    # ... and what pays with the new one is taken up within a few hundred steps.
    world.gain = 1.5
    world.guard.renew()
    world.run(1100)
    assert world.run(1000) > 0.9


def test_steps_that_mostly_read_prompts_are_not_compared():
    world = World(0.5)
    assert world.run(3000, prompt_rows=200, new=1) > 0.99


def test_waiting_for_a_request_is_no_step():
    world = World(0.8)
    for _ in range(300):
        # Prompts of one token, after a while.
        world.now += 0.8
        world.run(1, running=1, prompt_rows=0, new=1)
        world.run(4, running=1)
    for timing in world.guard.timings:
        assert timing.plain_s == pytest.approx(1.0)
        assert timing.guessing_s == pytest.approx(2.5)


def test_both_ways_to_decode_are_timed():
    world = World(0.8)
    assert world.guard.timings == []
    world.run(400)
    timings = world.guard.timings
    for timing in timings:
        ((rows, steps),) = timing.rows
        assert (timing.requests, rows, timing.bare_s) == (4, 3.0, 0.0)
        assert 30 < steps <= 48
        # One step in twenty takes ten seconds more, and does not count.
        assert timing.plain_s == pytest.approx(1.0)
        assert timing.guessing_s == pytest.approx(2.5)
    world.guard.renew()
    assert world.guard.timings == timings
    # Nine looks at a load are enough to know of.
    world.run(40_000)
    assert len(timings) < len(world.guard.timings) == 9


def test_it_says_which_steps_it_compares():
    world = World(1.2)
    looking = []
    for _ in range(600):
        world.run(1)
        looking.append(world.guard.looking)
    # Five blocks, each of sixteen steps and two before that settle.
    first = looking.index(True)
    assert first >= 16 and sum(looking) == sum(looking[first : first + 90]) == 90


def test_steps_are_timed_with_the_rows_they_had():
    steps = [TimedStep(rows, 8, rows, 0, 4) for rows in (1.0, 3.0, 3.0, 5.0)]
    look = Look(True, steps * 4)
    for _ in range(16):
        look.add(TimedStep(1.0, 4, 1.0, 0, 4))
    found = look.mean_step(True, 0.0)
    assert found == (3.0, ((1.0, 4), (3.0, 8), (5.0, 4)), 1.0)
    assert found.rows == pytest.approx(3.0)


PROFILE = LatencyProfile(
    (1, 2, 4), (1, 2, 4, 8), ((1, 1.2, 1.4, 2.0), (2, 2.2, 2.6, 3), (3, 4, 5, 7)), {}
)


def looks(
    requests: int, rows: float, plain_s: float, guessing_s: float, count: int = 10_000
) -> list[StepTiming]:
    """As many looks as it takes to be believed."""
    bare_s = guessing_s if rows == 1 else 0.0
    return [StepTiming(requests, ((rows, 48),), plain_s, guessing_s, bare_s)] * count


def test_a_profile_follows_the_clock():
    assert corrected(PROFILE, []) is PROFILE
    # Twice as slow, and rows cost three times as much as a plain step does.
    found = corrected(PROFILE, looks(1, 3.0, 2.0, 3.8))
    np.testing.assert_allclose(found.seconds[0], (2, 3.2, 4.4, 8.0), rtol=1e-3)
    np.testing.assert_allclose(found.seconds[1], (4, 5.2, 7.6, 10.0), rtol=1e-3)
    assert found.curve(1)(3) == pytest.approx(3.8, rel=1e-3)
    # The nearest load counts, and noise cannot turn a machine upside down.
    both = looks(1, 3.0, 1.0, 1.3) + looks(4, 2.0, 3.0, 2.5)
    found = corrected(PROFILE, both)
    np.testing.assert_allclose(found.seconds[0], PROFILE.seconds[0], rtol=1e-3)
    np.testing.assert_allclose(found.seconds[2], (3, 3.25, 3.5, 4.0), rtol=1e-3)


def test_a_slow_machine_is_slow_at_rows_too():
    """Looks come when it is fast and when it is slow, with other trees."""
    timings = []
    for speed, rows in ((1.0, 2.0), (3.0, 4.0), (1.5, 8.0)):
        guessing = speed * PROFILE.curve(1)(rows)
        timings += looks(1, rows, speed, guessing, 1)
    found = np.array(corrected(PROFILE, timings).seconds)
    np.testing.assert_allclose(found, 1.5 * np.array(PROFILE.seconds))


def test_one_disturbed_look_does_not_change_the_profile():
    timings = looks(1, 3.0, 2.0, 2.6, 4)
    found = corrected(PROFILE, [*timings, *looks(1, 3.0, 9.0, 20.0, 1)])
    np.testing.assert_allclose(found.seconds, corrected(PROFILE, timings).seconds)


@pytest.mark.parametrize("other", [1.0, 2.0])
def test_steps_of_different_size_are_no_steps_of_the_size_between(other):
    """Half of them had 8 rows, the others fewer, as the profile has it."""
    profile = LatencyProfile((1,), (1, 2, 4, 8), ((1, 1.5, 1.8, 2.0),), {})
    curve = profile.curve(1)
    seconds = (curve(other) + curve(8)) / 2
    assert seconds < 0.97 * curve((other + 8) / 2)
    timing = StepTiming(1, ((other, 24), (8.0, 24)), 1.0, seconds, curve(1))
    found = corrected(profile, [timing] * 9)
    np.testing.assert_allclose(found.seconds, profile.seconds)


def test_looking_for_guesses_is_told_apart_from_rows():
    """Four steps in five had none, and took longer than plain ones all the same."""
    seconds = ((1.0, 1.4, 2.0),)
    profile = LatencyProfile((1,), (1, 4, 8), seconds, {}, bare=(1.1,))
    rows = ((1.0, 40), (4.0, 10))
    for bare, cost in ((1.1, 1.0), (1.3, 1.0), (1.1, 2.0)):
        guessing = 0.8 * bare + 0.2 * (1 + cost * 0.4)
        timing = StepTiming(1, rows, 3.0, 3 * guessing, 3 * bare)
        found = corrected(profile, [timing] * 10_000)
        expected = (3, 3 + 1.2 * cost, 3 + 3 * cost)
        np.testing.assert_allclose(found.seconds[0], expected, rtol=1e-3)
        np.testing.assert_allclose(found.bare, 3 * bare, rtol=1e-3)
    # It is seen where the profile does not know of it too, and half believed.
    unknown = replace(profile, bare=())
    found = corrected(unknown, [StepTiming(1, rows, 1.0, 1.3, 1.21)] * 2)
    np.testing.assert_allclose(found.bare, 1.1)


def test_a_few_steps_say_nothing():
    profile = LatencyProfile((1,), (1, 4, 8), ((1.0, 1.4, 2.0),), {}, bare=(1.1,))
    few_bare = StepTiming(1, ((1.0, 3), (8.0, 45)), 1.0, 3.0, 1.2)
    found = corrected(profile, [few_bare] * 9)
    assert found.bare == pytest.approx(profile.bare)
    assert found.seconds[0][2] > 2.5
    few_rows = StepTiming(1, ((1.0, 45), (8.0, 3)), 1.0, 1.5, 1.2)
    found = corrected(profile, [few_rows] * 9)
    assert found.bare > profile.bare
    np.testing.assert_allclose(found.seconds, profile.seconds)


def test_a_few_looks_are_half_believed():
    # Rows seem to cost four times what the profile has.
    found = corrected(PROFILE, looks(1, 3.0, 2.0, 4.4, 2))
    np.testing.assert_allclose(found.seconds[0], (2, 2.8, 3.6, 6.0))


def test_steps_without_guesses_say_nothing_about_rows():
    found = corrected(PROFILE, looks(2, 1.0, 3.0, 3.15))
    np.testing.assert_allclose(found.seconds[1], (3, 3.3, 3.9, 4.5))
    assert found.bare[1] == pytest.approx(3.15, rel=1e-3)


@pytest.mark.parametrize("running", [1, 16])
def test_guesses_that_begin_to_fail_are_compared_at_once(running):
    world = World(1.5)
    world.run(20_000, running)
    assert world.run(2000, running) > 0.95
    # 1.25 tokens in 1.33 times the time, where the next probe may be 8,192 steps off.
    world.tokens = [1, 1, 1, 2]
    world.run(4000 if running == 1 else 200, running)
    assert world.run(1000, running) < 0.2


def test_what_a_row_of_a_prompt_costs():
    rows = [0, 0, 60, 64, 128, 0, 61, 62]
    seconds = [1.0 + 0.5 * n for n in rows]
    assert seconds_per_row(rows, seconds) == pytest.approx(0.5)
    # A step that waited for something else, and prompts of nearly the same length.
    seconds[3] += 50
    assert seconds_per_row(rows, seconds) == pytest.approx(0.5)
    assert seconds_per_row([0, 64, 64], [2.0, 1.0, 1.0]) == 0.0
    assert seconds_per_row([64, 64], [2.0, 1.0]) is None
    assert seconds_per_row([], []) is None


def test_a_look_bears_a_wrong_idea_of_what_prompts_cost():
    """Prompts became cheaper: by what they cost before, steps took no time at all."""
    look = Look(False, [TimedStep(1.0, 4, 1.0, 100, 4)] * 16)
    for _ in range(16):
        look.add(TimedStep(2.0, 12, 3.0, 100, 4))
    assert look.ratio(prompt_row_s=1.0) == pytest.approx(1.5)
    assert look.mean_step(True, prompt_row_s=1.0) == (
        pytest.approx(0.2),
        ((3.0, 16),),
        0.0,
    )
