"""The trainings that are compared, and the tables they are compared in.

Each run changes one thing in the baseline (m = 3, one EPT, KL to the model with alpha
0.8, started from text, 32 insertion points in each of 8 sequences).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from vllm_ppd.train.settings import TrainSettings

__all__ = [
    "BASELINE",
    "BASELINE_RATE",
    "TABLES",
    "Run",
    "Table",
    "chosen_tables",
    "runs_of",
]


@dataclass(frozen=True, eq=False)
class Run:
    """One short training."""

    name: str
    """Also the name of its folder."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TrainSettings that differ from the baseline's."""
    share: Fraction = Fraction(1)
    """Its part of the seconds per run."""
    text_tokens: int | None = None
    """Tokens of training text that it may draw from; None is all there are."""
    rate_factor: float = 1.0
    """Learning rate over the baseline's."""
    init_from: str | None = None
    """The run whose prompt tokens it starts with."""

    def train_settings(
        self, seconds: float, length: int, learning_rate: float, **base: Any
    ) -> TrainSettings:
        """What it trains with, seed 0; `base` are fields of the baseline.

        seconds: of a run with share 1. Raises SettingsError where things do not fit.
        """
        common = TrainSettings(
            minutes=float(self.share) * seconds / 60,
            length=length,
            learning_rate=learning_rate * self.rate_factor,
            **{**_BASELINE_SETTINGS, **base},
        )
        return replace(common, **self.settings)


@dataclass(frozen=True)
class Table:
    """Runs that differ in one thing."""

    key: str
    title: str
    variable: str
    """Head of the first column."""
    rows: tuple[tuple[str, Run], ...]
    """Label and run."""
    ordered: bool = True
    """Whether the rows are more and more of something."""


def _varied(
    name: str, values: Iterable[Any], own: Any, **fixed: Any
) -> tuple[tuple[str, Run], ...]:
    """A run per value of TrainSettings' field `name`; the baseline has value `own`."""
    return tuple(
        (f"{value}", BASELINE)
        if value == own
        else (f"{value}", Run(f"{name}={value}", {name: value, **fixed}))
        for value in values
    )


# Not the trainer's defaults, which follow from these tables and from train_speed.py.
_BASELINE_SETTINGS = {"batch_size": 8, "points": 32, "updates": 1}
# Times the trainer's default: four times the RMS of the embeddings.
BASELINE_RATE = 2.0
BASELINE = Run("baseline")
_SIXTEENTH, _QUARTER = Fraction(1, 16), Fraction(1, 4)
_SHORT = Run("time=1_16", share=_SIXTEENTH)
_FIRST = Run("time=1_4", share=_QUARTER)
_PROMPT_TOKENS = _varied("num_prompt_tokens", range(1, 7), 3)
_ONE = _PROMPT_TOKENS[0][1]
# One insertion point per sequence gives noisier gradients, which like smaller steps.
_GENTLE = Run("points=1,rate=1_4", {"points": 1}, rate_factor=0.25)


def _started(name: str, label: str, **how: Any) -> tuple[tuple[str, Run], ...]:
    """A way to start, with all of the time and with little of it."""
    return (
        (label, Run(f"init={name}", **how)),
        (
            f"{label}, 1/16 time",
            Run(f"init={name},1_16", share=_SIXTEENTH, **how),
        ),
    )


# In an order in which no run starts from a later one.
TABLES = (
    Table(
        "time",
        "Training tokens: the same text, more or less time",
        "seconds per run, times",
        (
            ("1/16", _SHORT),
            ("1/4", _FIRST),
            ("1", BASELINE),
            ("4", Run("time=4", share=Fraction(4))),
        ),
    ),
    Table(
        "text",
        "Training tokens: the same time, more or less text",
        "tokens of text",
        (
            *(
                (f"{tokens}", Run(f"text={tokens}", text_tokens=tokens))
                for tokens in (2048, 16384, 131072)
            ),
            ("all", BASELINE),
        ),
    ),
    Table("prompt_tokens", "Prompt tokens", "m", _PROMPT_TOKENS),
    Table("ept", "Ensemble prompt tokens", "EPT", _varied("num_ept", (1, 2, 4, 8), 1)),
    Table(
        "loss",
        "Loss",
        "loss",
        (
            ("KL to the model", BASELINE),
            ("hard labels", Run("loss=labels", {"loss": "labels"})),
        ),
        ordered=False,
    ),
    Table(
        "alpha",
        "Weight of distance i: alpha^(i-1)",
        "alpha",
        _varied("alpha", (0.4, 0.6, 0.8, 1.0), 0.8),
    ),
    Table(
        "init",
        "Initialisation",
        "start",
        (
            ("text", BASELINE),
            ("text, 1/16 time", _SHORT),
            *_started("vocabulary", "vocabulary", settings={"init": "vocabulary"}),
            *_started("shorter", "checkpoint of 1/4 time", init_from=_FIRST.name),
            *_started("m_1", "checkpoint with m = 1", init_from=_ONE.name),
        ),
        ordered=False,
    ),
    Table(
        "batch",
        "Sequences per step, at equal wall-clock",
        "sequences",
        _varied("batch_size", (1, 2, 4, 8), 8),
    ),
    Table(
        "points",
        "Insertion points per sequence, at equal wall-clock",
        "points",
        (
            ("1", Run("points=1", {"points": 1})),
            ("1, learning rate / 4", _GENTLE),
            *_varied("points", (4, 16, 32, 64), 32),
        ),
    ),
)


def chosen_tables(keys: Iterable[str] | None) -> tuple[Table, ...]:
    """The tables of these keys, in their order; all for None.

    Raises ValueError for a key that there is not.
    """
    if keys is None:
        return TABLES
    wanted = list(keys)
    known = [table.key for table in TABLES]
    for key in wanted:
        if key not in known:
            raise ValueError(
                f"there is no table {key!r}; choose from {', '.join(known)}"
            )
    return tuple(table for table in TABLES if table.key in wanted)


def runs_of(tables: Iterable[Table]) -> list[Run]:
    """Every run of the tables once, each after the one it starts from."""
    everything = {run.name: run for table in TABLES for _, run in table.rows}
    found: dict[str, Run] = {}

    def add(run: Run) -> None:
        if run.init_from is not None:
            add(everything[run.init_from])
        found.setdefault(run.name, run)

    for table in tables:
        for _, run in table.rows:
            add(run)
    return list(found.values())
