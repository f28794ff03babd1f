"""Pages whose tables are made from committed results."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ppd.files import write_bytes

__all__ = ["ResultsPage"]

_END = "<!-- end -->"


@dataclass(frozen=True)
class ResultsPage:
    """A page with a section that only a program writes.

    Attributes:
        page: the file, with a marker `begin` and, after it, an end.
        begin: names who writes the section.
        results: the file that the section shows; there may be none yet.
        read: reads it, raises ValueError for anything else.
        lines: what stands in the section.
    """

    page: Path
    begin: str
    results: Path
    read: Callable[[Path], dict[str, Any]]
    lines: Callable[[dict[str, Any]], list[str]]

    @classmethod
    def beside(
        cls,
        program: str,
        name: str,
        read: Callable[[Path], dict[str, Any]],
        lines: Callable[[dict[str, Any]], list[str]],
    ) -> ResultsPage:
        """The README.md beside a program of benchmarks/`name`/, for its results."""
        page = Path(program).with_name("README.md")
        results = page.parents[1] / "results" / f"{name}.json"
        begin = f"<!-- tables: benchmarks/{name}/page.py -->"
        return cls(page, begin, results, read, lines)

    def text_with(self, text: str, results: dict[str, Any] | None) -> str:
        """The page's text with its section anew; raises ValueError without markers."""
        pattern = re.compile(re.escape(self.begin) + ".*?" + re.escape(_END), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(
                f"the page has no line {self.begin!r} with an {_END!r} after it"
            )
        lines = ["No results are committed yet."]
        if results is not None:
            lines = self.lines(results)
        section = "\n".join([self.begin, *lines, _END])
        return pattern.sub(lambda _: section, text)

    def write(self, results: dict[str, Any] | None) -> None:
        """Bring the page up to date."""
        text = self.page.read_text(encoding="utf-8")
        write_bytes(self.page, self.text_with(text, results).encode())

    def command(self, about: str, argv: list[str] | None = None) -> int:
        """Write the page, or with --check say whether it is up to date."""
        parser = argparse.ArgumentParser(description=about.split("\n")[0])
        parser.add_argument("--check", action="store_true", help="only compare")
        args = parser.parse_args(argv)
        results = self.read(self.results) if self.results.exists() else None
        if not args.check:
            self.write(results)
            return 0
        text = self.page.read_text(encoding="utf-8")
        if self.text_with(text, results) != text:
            print(f"{self.page.name} does not show the committed results")
            return 1
        return 0
