"""The tree menu: the few policies that an engine serves, by draft length.

An entry has one `TreePolicy` for each *match class*: 0 where the request's last tokens
have no n-gram match earlier in its context, 1, 2, ... for longer and longer matches.
The engine's scheduler names an entry by its number of draft rows; 0 is a plain step.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_ppd.files import check_keys, read_json, write_json
from vllm_ppd.trees.tree import MAX_ROWS, SparseTree, TreeError, TreePolicy

MENU_FILE = "trees.json"
FORMAT = "ppd_tree_menu"
FORMAT_VERSION = 1
_REMEDY = "write it again with vllm-ppd calibrate, or remove it"
_ENTRY_KEYS = ("policies", "acceptance_length", "row_shares")


@dataclass(frozen=True)
class MenuEntry:
    """The trees of one draft length.

    Attributes:
        policies: one per match class.
        acceptance_length: mean acceptance length that the search expects, over all
            steps; None if not known.
        row_shares: (rows, share of the steps with so many), rising in rows; empty if
            not known.
    """

    policies: tuple[TreePolicy, ...]
    acceptance_length: float | None = None
    row_shares: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))
        shares = tuple((int(rows), float(share)) for rows, share in self.row_shares)
        object.__setattr__(self, "row_shares", shares)
        if not self.policies:
            raise TreeError("a menu entry needs at least one policy")
        if len({(p.num_prompt_tokens, p.num_ept) for p in self.policies}) > 1:
            raise TreeError(
                "all policies of an entry must be for the same prompt tokens"
            )
        if self.max_rows < 2:
            raise TreeError("a menu entry needs a tree of at least 2 rows")
        length = self.acceptance_length
        if length is not None and not 1 <= length <= MAX_ROWS:
            raise TreeError(
                f"acceptance_length is {length!r}; expected 1 to {MAX_ROWS}"
            )
        if shares and not (
            abs(sum(share for _, share in shares) - 1) <= 1e-6
            and min(share for _, share in shares) >= 0
            and min(rows for rows, _ in shares) >= 1
        ):
            raise TreeError(f"row_shares are {shares}; expected shares that sum to 1")

    @cached_property
    def max_rows(self) -> int:
        """Most rows of a request's step, root included."""
        return max(policy.max_rows for policy in self.policies)

    @property
    def num_draft_tokens(self) -> int:
        """Rows besides the root that vLLM schedules: its num_speculative_tokens."""
        return self.max_rows - 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "policies": [policy.to_dict() for policy in self.policies],
            "acceptance_length": self.acceptance_length,
            "row_shares": [list(pair) for pair in self.row_shares],
        }

    @classmethod
    def from_dict(cls, data: Any) -> MenuEntry:
        """Read what `to_dict` wrote; raises TreeError for anything else."""
        try:
            check_keys(data, _ENTRY_KEYS)
            policies = tuple(TreePolicy.from_dict(each) for each in data["policies"])
            shares = tuple((rows, share) for rows, share in data["row_shares"])
            return cls(policies, data["acceptance_length"], shares)
        except (TypeError, ValueError, OverflowError) as error:
            raise TreeError(f"a menu entry cannot be used: {error}") from error


@dataclass(frozen=True)
class TreeMenu:
    """Entries by rising draft length.

    ``trees`` lists every tree once: first the root-only tree, then entry by entry,
    class by class, by ``num_prompted``. A tree's index there is its *tree id*.

    Raises:
        TreeError: no entry, draft lengths that do not rise, or entries for different
            prompt tokens or numbers of match classes.
    """

    entries: tuple[MenuEntry, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        if not self.entries:
            raise TreeError("a tree menu needs at least one entry")
        lengths = list(self.draft_lengths)
        if sorted(set(lengths)) != lengths:
            raise TreeError(f"the draft lengths of a menu must rise, not {lengths}")
        shapes = {
            (len(e.policies), e.policies[0].num_prompt_tokens, e.policies[0].num_ept)
            for e in self.entries
        }
        if len(shapes) > 1:
            raise TreeError(
                "all entries of a menu must be for the same prompt tokens and have the "
                "same number of match classes"
            )

    @cached_property
    def draft_lengths(self) -> tuple[int, ...]:
        """num_draft_tokens of each entry."""
        return tuple(entry.num_draft_tokens for entry in self.entries)

    @property
    def num_classes(self) -> int:
        """Match classes, the one without a match included."""
        return len(self.entries[0].policies)

    @property
    def num_prompt_tokens(self) -> int:
        return self.entries[0].policies[0].num_prompt_tokens

    @property
    def num_ept(self) -> int:
        return self.entries[0].policies[0].num_ept

    @property
    def max_rows(self) -> int:
        return self.entries[-1].max_rows

    @cached_property
    def trees(self) -> tuple[SparseTree, ...]:
        root_only = SparseTree((), (), (0,), self.num_ept)
        policies = (policy for entry in self.entries for policy in entry.policies)
        return (root_only, *(tree for policy in policies for tree in policy.trees))

    @cached_property
    def chained(self) -> tuple[bool, ...]:
        """For each tree whether its rank-0 chain is the n-gram draft."""
        per_entry = [
            match_class > 0
            for match_class in range(self.num_classes)
            for _ in range(self.num_prompt_tokens + 1)
        ]
        return (False, *(per_entry * len(self.entries)))

    @cached_property
    def first_trees(self) -> tuple[int, ...]:
        """For each entry the tree id of match class 0, num_prompted 0."""
        size = self.num_classes * (self.num_prompt_tokens + 1)
        return tuple(1 + size * index for index in range(len(self.entries)))

    def entry_of(self, num_draft_tokens: int) -> int | None:
        """The largest entry with at most so many draft rows; None for a plain step."""
        index = bisect_right(self.draft_lengths, num_draft_tokens) - 1
        return None if index < 0 else index

    def first_tree(self, num_draft_tokens: int) -> int:
        """Tree id of that entry's match class 0, num_prompted 0; 0 in a plain step."""
        index = self.entry_of(num_draft_tokens)
        return 0 if index is None else self.first_trees[index]

    def limited(self, max_rows: int) -> TreeMenu | None:
        """The menu without entries of more rows; None if no entry is left."""
        entries = tuple(entry for entry in self.entries if entry.max_rows <= max_rows)
        return TreeMenu(entries) if entries else None

    def to_dict(self) -> dict[str, Any]:
        return {"entries": [entry.to_dict() for entry in self.entries]}

    @classmethod
    def from_dict(cls, data: Any) -> TreeMenu:
        """Read what `to_dict` wrote; raises TreeError for other entries."""
        entries = data["entries"]
        if not isinstance(entries, list):
            raise TreeError(
                f"a menu must be a list of entries, not {type(entries).__name__}"
            )
        return cls(tuple(MenuEntry.from_dict(entry) for entry in entries))


def save_menus(path: Path | str, variable_rows: TreeMenu, fixed_rows: TreeMenu) -> None:
    """Write trees.json: the menu for engines in which every request's tree has its own
    number of rows, and the one for engines that pad all of a step's trees alike."""
    write_json(
        path,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "variable_rows": variable_rows.to_dict()["entries"],
            "fixed_rows": fixed_rows.to_dict()["entries"],
        },
        # Indented, thousands of short lists would stand on lines of their own.
        indent=None,
    )


def load_menus(path: Path | str) -> tuple[TreeMenu, TreeMenu]:
    """Read what `save_menus` wrote: (variable rows, fixed rows).

    Raises:
        FormatError, TreeError: a file that cannot be used; the message names it.
    """
    content = read_json(
        path,
        kind="the tree menu",
        format=FORMAT,
        version=FORMAT_VERSION,
        keys=("variable_rows", "fixed_rows"),
        remedy=_REMEDY,
    )
    try:
        variable, fixed = (
            TreeMenu.from_dict({"entries": content[name]})
            for name in ("variable_rows", "fixed_rows")
        )
        return variable, fixed
    except TreeError as error:
        raise TreeError(f"{path}: {error}; {_REMEDY}") from error
