"""What the demo's measurements amount to, in numbers and in honest words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from vllm_ppd.cli.generation import Generation

# Gap between the two likeliest tokens, in nats, below which rounding alone can decide:
# logits of 16 to 32 are 0.125 apart in bf16.
NEAR_TIE = 0.25
# Share of repeated 4-grams above which a reader should know.
LOOPING = 0.3


@dataclass(frozen=True)
class Comparison:
    """One prompt, written by both; `rounds` of each in alternation."""

    prompt: str
    plain: tuple[Generation, ...]
    ppd: tuple[Generation, ...]

    @property
    def plain_speed(self) -> float:
        """Median tokens per second."""
        return median(g.tokens_per_s for g in self.plain)

    @property
    def ppd_speed(self) -> float:
        return median(g.tokens_per_s for g in self.ppd)

    @property
    def speedup(self) -> float:
        """Median over rounds of PPD's speed against plain's in the same round."""
        return median(
            ppd.tokens_per_s / plain.tokens_per_s
            for plain, ppd in zip(self.plain, self.ppd, strict=True)
        )

    @property
    def first_difference(self) -> int | None:
        """Index of the first token id that differs in the first round, or None.

        Texts of which one continues the other differ where the shorter ends.
        """
        ours, theirs = self.ppd[0].ids, self.plain[0].ids
        if ours == theirs:
            return None
        pairs = zip(ours, theirs, strict=False)
        common = min(len(ours), len(theirs))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), common)


@dataclass(frozen=True)
class Totals:
    """All prompts of a demo together, taken from each prompt's first round."""

    plain_tokens: int
    ppd_tokens: int
    plain_steps: int
    ppd_steps: int
    tokens_per_step: float
    speedup: float
    plain_step_ms: float
    ppd_step_ms: float

    @classmethod
    def of(cls, comparisons: Sequence[Comparison]) -> Totals:
        plain = [c.plain[0] for c in comparisons]
        ppd = [c.ppd[0] for c in comparisons]
        decoded = sum(len(g.ids) - len(g.steps[0].ids) for g in ppd if g.steps)
        decode_steps = sum(len(g.steps) - 1 for g in ppd if g.steps)
        return cls(
            plain_tokens=sum(len(g.ids) for g in plain),
            ppd_tokens=sum(len(g.ids) for g in ppd),
            plain_steps=sum(len(g.steps) for g in plain),
            ppd_steps=sum(len(g.steps) for g in ppd),
            tokens_per_step=decoded / decode_steps if decode_steps else 1.0,
            speedup=median(c.speedup for c in comparisons),
            plain_step_ms=_step_ms([g for c in comparisons for g in c.plain]),
            ppd_step_ms=_step_ms([g for c in comparisons for g in c.ppd]),
        )


def _step_ms(generations: Sequence[Generation]) -> float:
    """Median duration of a decode step in milliseconds."""
    gaps = [
        later.at_s - earlier.at_s
        for g in generations
        for earlier, later in zip(g.steps, g.steps[1:], strict=False)
    ]
    return 1000 * median(gaps) if gaps else 0.0


@dataclass(frozen=True)
class NearTie:
    """The two likeliest tokens where two greedy texts part."""

    prompt: int
    position: int
    gap: float
    first: str
    second: str

    def __str__(self) -> str:
        where = f"prompt {self.prompt + 1} from token {self.position + 1}"
        choice = f"{self.first!r} over {self.second!r} by {self.gap:.3f} nats"
        verdict = (
            "a near-tie, which rounding decides"
            if self.gap < NEAR_TIE
            else "not a near-tie: please report this"
        )
        return f"{where}: the model prefers {choice} there, {verdict}"


def verdict(
    comparisons: Sequence[Comparison],
    ties: Sequence[NearTie],
    dtype: str,
    temperature: float,
) -> list[str]:
    """Sentences for the end of a demo: speed first, then exactness."""
    said = [_speed(Totals.of(comparisons))]
    repeated = median(c.plain[0].repeated for c in comparisons)
    if repeated > LOOPING:
        said.append(
            f"The model repeats itself: {repeated:.0%} of the 4-grams in its texts "
            "occurred before, and loops are easy to guess. "
            + ("" if temperature else "--temperature 0.7 gives livelier texts.")
        )
    return said + _exactness(comparisons, ties, dtype, temperature)


def _speed(totals: Totals) -> str:
    cost = totals.ppd_step_ms / totals.plain_step_ms if totals.plain_step_ms else 1.0
    steps = (
        f"{totals.tokens_per_step:.2f} tokens per step, and a step took "
        f"{totals.ppd_step_ms:.1f} ms instead of {totals.plain_step_ms:.1f} ms "
        f"({cost:.2f}x)"
    )
    if totals.speedup >= 1.02:
        return f"PPD was {totals.speedup:.2f}x as fast: {steps}."
    if totals.speedup > 0.98:
        return f"PPD was no faster here ({totals.speedup:.2f}x): {steps}."
    return (
        f"PPD was slower here ({totals.speedup:.2f}x): {steps}. Fewer steps pay off "
        "only while each costs little more; the extra rows cost most where little "
        "computing power is to spare, as on few CPU cores or a busy machine."
    )


def _exactness(
    comparisons: Sequence[Comparison],
    ties: Sequence[NearTie],
    dtype: str,
    temperature: float,
) -> list[str]:
    if temperature > 0:
        return [
            f"At temperature {temperature:g} both draw at random from the same "
            "distribution, so the two texts are not expected to be equal."
        ]
    same = sum(c.first_difference is None for c in comparisons)
    if same == len(comparisons):
        tokens = sum(len(c.ppd[0].ids) for c in comparisons)
        return [f"All {tokens:,} token ids are identical to plain vLLM's."]
    lines = [
        f"Token ids are identical for {same} of {len(comparisons)} prompts. In {dtype} "
        "a step of several rows rounds a little differently from a step of one, which "
        "can flip near-ties; --dtype float32 keeps them apart."
        if dtype != "float32"
        else f"Token ids are identical for {same} of {len(comparisons)} prompts only; "
        "in float32 they should all be: please report this."
    ]
    return [*lines, *map(str, ties)]
