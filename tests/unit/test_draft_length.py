"""The promises of the draft length controller, on a simulated machine and text."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from vllm_ppd.adaptive.draft_length import DraftLengthController, load_buckets

LENGTHS = (1, 3, 7, 15, 31, 63)
# A menu for cores, which are soon compute-bound.
CPU_LENGTHS = (1, 3, 7, 15)
# Acceptance length of each draft length; 0 is plain decoding.
EASY = {0: 1.0, 1: 1.42, 3: 1.8, 7: 2.2, 15: 2.6, 31: 2.9, 63: 3.1}
HARD = {0: 1.0, 1: 1.03, 3: 1.05, 7: 1.07, 15: 1.08, 31: 1.09, 63: 1.1}


def gpu(rows: int) -> float:
    """Seconds of a step: 64 rows take 1.13 times as long as one."""
    return 0.0058 * (1 + 0.13 * (rows - 1) / 63 + max(0, rows - 256) / 256)


def cpu(rows: int) -> float:
    """A 135 M model on two cores: 72, 82, 101, 115, 156 ms for 1, 2, 4, 8, 16 rows."""
    return 0.072 + 0.0053 * (rows - 1)


@dataclass
class Machine:
    """Steps of `num_running` requests whose drafts a controller decides on."""

    controller: DraftLengthController
    seconds_of_rows: object
    acceptance: dict[int, float]
    num_running: int = 1
    noise: float = 0.15
    seed: int = 0
    drift: float = 0.0
    time: float = 0.0
    tokens: int = 0
    steps: int = 0
    used: dict[int, int] = field(default_factory=dict)
    # Rows of a prompt that one more request reads in the next step.
    prompt_rows: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.next_length = 0

    def emitted(self, length: int) -> int:
        """Tokens of one request: geometric, at most one more than draft tokens."""
        stay = 1 - 1 / self.acceptance[length]
        count = 1
        while count <= length and self.rng.random() < stay:
            count += 1
        return count

    def mean_seconds(self, length: int) -> float:
        return self.seconds_of_rows(self.num_running * (length + 1))

    def step(self, outlier: float = 1.0) -> None:
        length = self.next_length
        # The scheduler decides for the step after.
        self.next_length = self.controller.schedule[self.num_running]
        tokens = sum(self.emitted(length) for _ in range(self.num_running))
        # One and a half minutes of another speed, then back.
        slow = 1 + self.drift * (self.steps // 1500 % 2)
        noise = 1 + self.rng.uniform(-self.noise, self.noise)
        seconds = (self.mean_seconds(length) + self.prompt_rows * 4e-4) * noise * slow
        prompt = (1, self.prompt_rows) if self.prompt_rows else ()
        running = self.num_running + len(prompt[:1])
        self.controller.observe(running, length, tokens, seconds * outlier, *prompt)
        self.steps += 1
        self.time += self.mean_seconds(length)
        self.tokens += tokens
        self.used[length] = self.used.get(length, 0) + 1

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def speed(self, length: int) -> float:
        """Tokens per second of one draft length, kept for ever."""
        stay = 1 - 1 / self.acceptance[length]
        mean = sum(stay**depth for depth in range(length + 1))
        return self.num_running * mean / self.mean_seconds(length)

    def best(self) -> int:
        return max((0, *LENGTHS), key=self.speed)


def machine(
    seconds, acceptance, running=1, start=None, lengths=LENGTHS, seed=0, **more
) -> Machine:
    prior = None if start is None else [start] * len(load_buckets(256))
    controller = DraftLengthController(lengths, 256, prior)
    return Machine(controller, seconds, acceptance, running, seed=seed, **more)


def test_buckets():
    assert load_buckets(1) == [1]
    assert load_buckets(8) == [1, 2, 4, 8]
    assert load_buckets(100) == [1, 2, 4, 8, 16, 32, 64, 100]


def test_the_prior_is_where_buckets_start():
    controller = DraftLengthController(LENGTHS, 6, [63, 15, 3, 0])
    assert controller.schedule == [0, 63, 15, 3, 3, 0, 0]
    controller = DraftLengthController(LENGTHS, 6, [7], uniform=True)
    assert controller.schedule == [0, 7, 7, 7, 7, 7, 7]


def test_a_load_that_was_never_seen_starts_plain():
    controller = DraftLengthController(LENGTHS, 64)
    assert set(controller.schedule) == {0}
    one = machine(gpu, EASY)
    one.run(4000)
    schedule = one.controller.schedule
    assert schedule[1] > 0 and set(schedule[2:]) == {0}


@pytest.mark.parametrize("running", [1, 4, 16, 64])
@pytest.mark.parametrize("start", [1, 3, 15])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_losing_entry_is_left_and_costs_little(running, start, seed):
    # Sixteen rows of 64 requests take thirteen times as long as one of each.
    loser = machine(cpu, HARD, running, start, CPU_LENGTHS, seed=seed)
    assert loser.best() == 0
    for _ in range(2000):
        loser.step()
        if loser.controller.snapshot() and (
            loser.controller.snapshot()[0]["draft_length"] == 0
        ):
            break
    assert loser.steps < 2000
    loser.run(20_000 - loser.steps)
    speed = loser.tokens / loser.time
    assert speed > 0.97 * loser.speed(0)


@pytest.mark.parametrize("running", [1, 4, 16, 64])
def test_what_all_probes_cost_is_limited(running):
    plain = machine(cpu, HARD, running, lengths=CPU_LENGTHS)
    plain.run(500)
    assert plain.tokens / plain.time > 0.96 * plain.speed(0)
    plain.run(19_500)
    assert plain.tokens / plain.time > 0.985 * plain.speed(0)


def test_what_promises_most_is_probed_first():
    ratios = [[gpu(length + 1) / gpu(1) for length in LENGTHS]]
    controller = DraftLengthController(
        LENGTHS, 8, None, [EASY[length] for length in LENGTHS], ratios, uniform=True
    )
    served = Machine(controller, gpu, EASY)
    served.run(20)
    assert set(served.used) == {0, served.best()}


@pytest.mark.parametrize("running", [1, 4, 16])
@pytest.mark.parametrize("seed", range(4))
def test_noise_changes_nothing_that_pays_ten_per_cent(running, seed):
    """One entry pays 10 %, others lose as much: it stays, whatever single steps say."""

    def seconds(rows: int) -> float:
        return {1: 1.0, 4: 1.4 / 1.1}.get(rows // running, 2.6)

    acceptance = {0: 1.0, 1: 1.1, 3: 1.4, 7: 1.9, 15: 2.0, 31: 2.1, 63: 2.2}
    # What the geometric text really emits with 3 draft tokens at most.
    exact = sum((1 - 1 / 1.4) ** k for k in range(4))
    scale = exact / 1.4
    quiet = machine(
        lambda rows: seconds(rows) * (scale if rows // running == 4 else 1.0),
        acceptance,
        running,
        start=3,
        seed=seed,
    )
    quiet.run(20_000)
    assert quiet.used[3] > 0.93 * quiet.steps
    assert quiet.tokens / quiet.time > 0.97 * quiet.speed(3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("seconds", "before", "after"),
    [(gpu, EASY, HARD), (cpu, HARD, EASY), (cpu, EASY, HARD)],
    ids=["gpu-harder", "cpu-easier", "cpu-harder"],
)
def test_changed_traffic_is_followed(seconds, before, after, seed):
    traffic = machine(seconds, before, 2, seed=seed)
    traffic.run(12_000)
    traffic.acceptance = after
    traffic.run(5000)
    time, tokens = traffic.time, traffic.tokens
    traffic.run(4000)
    speed = (traffic.tokens - tokens) / (traffic.time - time)
    assert speed > 0.93 * traffic.speed(traffic.best())


@pytest.mark.parametrize(
    ("seconds", "lengths", "start"),
    [
        *[(gpu, LENGTHS, start) for start in (None, 1, 63)],
        *[(cpu, CPU_LENGTHS, start) for start in (None, 1, 15)],
    ],
)
@pytest.mark.parametrize("running", [1, 4, 16, 64])
def test_in_the_long_run_it_is_near_the_best_entry(seconds, lengths, start, running):
    served = machine(seconds, EASY, running, start, lengths, seed=3, drift=0.3)
    served.run(6000)
    time, tokens = served.time, served.tokens
    served.run(20_000)
    speed = (served.tokens - tokens) / (served.time - time)
    assert speed > 0.95 * served.speed(served.best())


def test_one_outlier_changes_nothing():
    steady = machine(gpu, EASY, 1, 63, noise=0.0)
    steady.run(50)
    for index in range(6000):
        steady.step(outlier=5.0 if index % 97 == 0 else 1.0)
    assert steady.tokens / steady.time > 0.97 * steady.speed(63)


def test_steps_that_also_read_prompts_count():
    busy = machine(cpu, EASY, 12, lengths=CPU_LENGTHS)
    for index in range(8000):
        busy.prompt_rows = 60 if index % 6 else 0
        busy.step()
    assert busy.speed(busy.controller.schedule[12]) > 0.95 * busy.speed(
        max((0, *CPU_LENGTHS), key=busy.speed)
    )
    # No time of such a step is known: what is tried ends, and what was chosen stays.
    chosen, before = busy.controller.schedule[12], dict(busy.used)
    busy.prompt_rows = 20_000
    busy.run(3000)
    assert busy.used[chosen] - before[chosen] > 2900


def test_a_load_that_falls_and_rises_is_no_other_speed():
    """Plain steps of 33 requests take 17 ms, those of 64, in the same bucket, 23 ms."""

    def seconds(rows: int) -> float:
        return 0.01 + 0.0002 * rows

    plain = [seconds(running) for running in range(257)]
    controller = DraftLengthController((1,), 256, plain_seconds=plain)
    # Pays 5 to 17 %.
    waves = Machine(controller, seconds, {0: 1.0, 1: 2.75}, 64, noise=0.02)
    for index in range(450):
        waves.num_running = 33 if index % 20 < 10 else 64
        waves.step()
    assert waves.used[1] > 300


def test_loads_that_alternate_do_not_mix():
    served = machine(gpu, EASY, 1)
    for index in range(30_000):
        served.num_running = 1 if index // 5 % 2 else 64
        served.step()
    one, many = served.controller.schedule[1], served.controller.schedule[64]
    served.num_running = 1
    assert served.speed(one) > 0.9 * served.speed(served.best())
    served.num_running = 64
    assert served.speed(many) > 0.9 * served.speed(served.best())


def test_what_is_held_or_frozen_never_changes():
    frozen = DraftLengthController(LENGTHS, 8, [7, 7, 7, 7], adapts=False)
    served = Machine(frozen, cpu, HARD, 2)
    served.run(3000)
    assert set(frozen.schedule[1:]) == {7}
    frozen.hold(3)
    served.run(1000)
    assert set(frozen.schedule[1:]) == {3}


def test_changes_are_told_once():
    loser = machine(cpu, HARD, 4, 15)
    loser.run(2000)
    lines = loser.controller.take_changes()
    assert lines and lines[0].startswith("draft length 15 -> ")
    assert "for up to 4 requests (acceptance length 1." in lines[0]
    assert loser.controller.take_changes() == []
