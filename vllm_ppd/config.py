"""User-facing settings: the PPD keys of vLLM's ``speculative_config``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_ppd.files import FormatError, check_keys
from vllm_ppd.trees.tree import MAX_ROWS

METHOD = "ppd"
MODEL_PREFIX = "ppd:"
# Most rows of a request's step unless the user sets a limit: CPU cores are soon
# compute-bound (benchmarks/step_cost.py), a GPU has slack for many more.
DEFAULT_ROWS = {"cpu": 16, "cuda": 64}


class PPDConfigError(ValueError):
    """A PPD setting that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class PPDConfig:
    """PPD's settings.

    Raises:
        PPDConfigError: a value of the wrong type or out of range.
    """

    path: str | None
    """Folder or hub id of the prompt tokens; the key is vLLM's ``model``. None for what
    is known for the model, if anything."""
    num_speculative_tokens: int | None = None
    """Upper limit of draft rows (draft tokens and prompt rows) per request and step."""
    tree: str | None = None
    """File of a tree menu (trees.json) to serve instead of the folder's own."""
    profile: str = "auto"
    """Latency profile that sets the first draft lengths: "auto" measures the machine at
    its first start and keeps the result, "measure" measures at every start, "none" does
    without, else a file's path."""
    measure_seconds: float = 20.0
    """Time budget of that measurement; it starts no further round after it."""
    bigram: bool = True
    """Draft tokens are ranked by the bigram table as well."""
    ngram: bool = True
    """Draft tokens are also taken from n-gram matches in the request's own text."""
    online: bool = True
    """Draft lengths and the bigram table adapt to the traffic."""

    def __post_init__(self) -> None:
        rows, seconds = self.num_speculative_tokens, self.measure_seconds
        for name, fits, expected in (
            (
                "path",
                self.path is None or (isinstance(self.path, str) and self.path.strip()),
                "a folder or a hub id of prompt tokens, as in speculative_config="
                '{"method": "ppd", "model": PATH}, or leave it out',
            ),
            (
                "num_speculative_tokens",
                rows is None or (type(rows) is int and 1 <= rows < MAX_ROWS),
                f"a whole number from 1 to {MAX_ROWS - 1}, or leave it out (to serve "
                "without speculation, leave out the whole speculative_config)",
            ),
            ("tree", self.tree is None or isinstance(self.tree, str), "a file's path"),
            (
                "profile",
                isinstance(self.profile, str) and self.profile != "",
                "'auto', 'measure', 'none' or a file's path",
            ),
            (
                "measure_seconds",
                isinstance(seconds, int | float)
                and not isinstance(seconds, bool)
                and 0 < seconds < math.inf,
                "a number above 0",
            ),
            ("bigram", isinstance(self.bigram, bool), "true or false"),
            ("ngram", isinstance(self.ngram, bool), "true or false"),
            ("online", isinstance(self.online, bool), "true or false"),
        ):
            if not fits:
                raise PPDConfigError(
                    f"{name} is {getattr(self, name)!r}; expected {expected}"
                )

    def max_rows(self, device: str, num_ept: int) -> int:
        """Most rows of a request's step, root included, on "cpu" or "cuda".

        Raises:
            PPDConfigError: a limit that leaves no room for one prompt token.
        """
        rows = self.num_speculative_tokens
        if rows is None:
            return MAX_ROWS if self.tree else max(DEFAULT_ROWS[device], 1 + num_ept)
        if rows < num_ept:
            raise PPDConfigError(
                f"num_speculative_tokens is {rows}, too small for any tree: one prompt "
                f"token takes {num_ept} row{'s' * (num_ept > 1)}; allow at least "
                f"{num_ept}, or leave it out"
            )
        return rows + 1

    @staticmethod
    def selected_by(speculative: Mapping[str, Any] | None) -> bool:
        """Whether a vLLM ``speculative_config`` asks for PPD."""
        if not speculative:
            return False
        method, model = speculative.get("method"), speculative.get("model")
        return method == METHOD or (
            method is None
            and isinstance(model, str)
            and (model == METHOD or model.startswith(MODEL_PREFIX))
        )

    @classmethod
    def from_speculative(cls, speculative: Mapping[str, Any]) -> PPDConfig:
        """Read a vLLM ``speculative_config`` for which ``selected_by`` holds.

        Raises:
            PPDConfigError: as the class does, and for keys that PPD does not have.
        """
        values = {k.replace("-", "_"): v for k, v in speculative.items()}
        method, model = values.pop("method", None), values.pop("model", None)
        if method is None and model == METHOD:
            model = None
        if isinstance(model, str):
            model = model.removeprefix(MODEL_PREFIX)
        keys = [field.name for field in dataclasses.fields(cls)][1:]
        try:
            check_keys(values, (), keys)
        except FormatError as error:
            raise PPDConfigError(
                f"speculative_config of method 'ppd' has an {error}"
            ) from error
        return cls(path=model, **values)
