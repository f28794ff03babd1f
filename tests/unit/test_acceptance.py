"""Acceptance tables: what is read back, and every input that must be refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from vllm_ppd import files as atomic
from vllm_ppd.search.acceptance_table import AcceptanceError, AcceptanceStats

TABLE = [[0.5, 0.2, 0.1], [0.3, 0.1, 0.15]]
SOURCE = {"model": "org/base", "text": ["a", "b"], "positions": 1000}


def refused(values: object, *words: str) -> None:
    with pytest.raises(AcceptanceError) as caught:
        AcceptanceStats(values)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, "vllm-ppd calibrate"):
        assert word in message, message


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    third = [[1 / 3, 1e-300, 0.1 + 0.2]]
    for table, source in ((TABLE, SOURCE), (third, None), ([[0, 1]], {})):
        AcceptanceStats(np.array(table), source).save(path)
        loaded = AcceptanceStats.load(path)
        assert loaded.acceptance.dtype == np.float64
        assert loaded.acceptance.tolist() == table
        assert loaded.source == source
    content = json.loads(path.read_text())
    assert (content["format"], content["format_version"]) == ("ppd_acceptance", 1)
    assert os.listdir(tmp_path) == ["acceptance.json"]


def test_sizes_and_immutability() -> None:
    values = np.array(TABLE, dtype=np.float32)
    stats = AcceptanceStats(values)
    assert (stats.num_prompt_tokens, stats.num_ranks) == (2, 3)
    values[0, 0] = 9
    assert stats.acceptance[0, 0] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        stats.acceptance[0, 0] = 9
    AcceptanceStats(np.array([[0.5, 0.5 + 5e-7]]))  # rounding of a sum is forgiven


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.5, 0.2], ["shape [2]", "[prompt tokens, ranks]"]),
        ([[[0.5]]], ["shape [1, 1, 1]"]),
        ([[]], ["shape [1, 0]"]),
        ([], ["shape [0]"]),
        (0.5, ["shape []"]),
        ([[0.5, 0.2], [0.5]], ["not a table of numbers"]),
        ([["0.5"]], ["not a table of numbers"]),
        ([[True]], ["not a table of numbers"]),
        ([[None]], ["not a table of numbers"]),
        ({"1": [0.5]}, ["not a table of numbers"]),
        ([[10**400]], ["not a table of numbers"]),
        ([[0.5, 1.2]], ["acceptance[0][1] is 1.2", "[0, 1]"]),
        ([[0.5, 0.2], [0.1, -0.25]], ["acceptance[1][1] is -0.25"]),
        ([[float("nan")]], ["acceptance[0][0] is nan"]),
        ([[float("inf")]], ["acceptance[0][0] is inf"]),
        ([[0.5, 0.4], [0.5, 0.7]], ["acceptance[1] sums to 1.2", "at most 1"]),
    ],
)
def test_bad_tables(values: object, words: list[str]) -> None:
    refused(values, *words)


@pytest.mark.parametrize(
    ("source", "word"),
    [("text", "expected an object"), ({"a": {1}}, "JSON"), ({"a": np.nan}, "JSON")],
)
def test_bad_sources(source: object, word: str) -> None:
    with pytest.raises(AcceptanceError, match=word):
        AcceptanceStats(np.array(TABLE), source)  # type: ignore[arg-type]


def content(**changes: object) -> str:
    data = AcceptanceStats(np.array(TABLE), SOURCE).to_dict() | changes
    return json.dumps({k: v for k, v in data.items() if v is not ...})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["is not JSON"]),
        ("\xff", ["is not JSON"]),
        ("[" * 100_000, ["is not JSON"]),
        ("[1]", ["no acceptance table", "no format"]),
        ('{"acceptance": [[0.5]]}', ["no acceptance table", "no format"]),
        (content(format="ppd_tree_policy"), ["'ppd_tree_policy'"]),
        (content(format_version=2), ["format_version is 2", "upgrade"]),
        (content(format_version=True), ["format_version is True"]),
        (content(format_version=...), ["format_version is None"]),
        (content(acceptence=[]), ["'acceptence'", "did you mean 'acceptance'"]),
        (content(rows=3), ["unknown key 'rows'"]),
        (content(acceptance=...), ["'acceptance' is missing"]),
        (content(acceptance=[[float("nan")]]), ["acceptance[0][0] is nan"]),
        (content(acceptance=[[2]]), ["acceptance[0][0] is 2"]),
        (content(source="me"), ["source is 'me'"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "acceptance.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(AcceptanceError) as caught:
        AcceptanceStats.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message, message


def test_unreadable_and_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = AcceptanceStats(np.array(TABLE))
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(AcceptanceError, match="cannot be read"):
            AcceptanceStats.load(path)
    with pytest.raises(AcceptanceError, match="cannot be written"):
        stats.save(tmp_path / "nowhere" / "acceptance.json")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "acceptance.json"
    stats.save(path)
    monkeypatch.setattr(atomic.os, "fsync", full_disk)
    with pytest.raises(AcceptanceError, match="No space left"):
        AcceptanceStats(np.array([[0.1]])).save(path)
    assert AcceptanceStats.load(path).acceptance.tolist() == TABLE
    assert os.listdir(tmp_path) == ["acceptance.json"]
