"""Data sets become files: which names are data sets, and what a copy holds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from tests.unit.refusals import refused
from tests.unit.test_bad_input import COMMANDS, place
from vllm_ppd.cli import main
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.train.data import text_files
from vllm_ppd.train.datasets import DatasetName, copy_dataset
from vllm_ppd.train.documents import find_documents
from vllm_ppd.train.job import TrainJob
from vllm_ppd.train.settings import TrainingError

__all__ = ["place"]
NAME = DatasetName("org/text", None, "train", False)
ROWS = [{"text": f"row {i} of some text", "id": i} for i in range(50)]


class Rows(list):
    """As a data set is: shuffled by a seed, then gone through."""

    def shuffle(self, seed: int) -> Rows:
        return Rows(self[seed:] + self[:seed])


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What stands for `datasets.load_dataset`."""
    fake = Mock(return_value=Rows(ROWS))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fake))
    return fake


def test_what_is_a_data_set(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "owner").mkdir()
    (tmp_path / "odd@name").write_text("a text")
    for text, expected in {
        "allenai/c4": ("allenai/c4", None, "train", False),
        "allenai/c4:en@validation": ("allenai/c4", "en", "validation", False),
        "org/chat@train[:10%]": ("org/chat", None, "train[:10%]", False),
        "folder": ("folder", None, "train", True),
        "folder@test": ("folder", None, "test", True),
    }.items():
        found = DatasetName.parse(text)
        assert found is not None
        assert dataclasses.astuple(found) == expected
    for text in (
        "odd@name",  # a file that is there
        "text.jsonl",
        "missing.txt",
        "missing",
        "data/text.jsonl",
        "owner/name",  # in a folder that is there: a file was meant
        "/absolute/name",
        "a/b/c",
    ):
        assert DatasetName.parse(text) is None, text


def test_a_copy_holds_the_rows_and_is_made_once(load, tmp_path: Path) -> None:
    name = DatasetName.parse("org/text:small@part")
    assert name is not None
    how: Any = {"folder": tmp_path / "data", "max_bytes": 1 << 20, "seed": 3}
    file = copy_dataset(name, **how)
    assert copy_dataset(name, **how) == file
    load.assert_called_once_with("org/text", "small", split="part", streaming=True)
    texts = [document.read() for document in find_documents(file)]
    assert texts == [row["text"] for row in ROWS[3:] + ROWS[:3]]
    assert os.listdir(tmp_path / "data") == [file.name]
    assert file.name.startswith("org-text-part-")
    changes: Any = {"seed": 1}, {"max_bytes": 100}
    others = {copy_dataset(name, **how | each) for each in changes}
    others.add(copy_dataset(dataclasses.replace(name, split="x"), **how))
    assert len(others | {file}) == 4


def test_only_what_is_read_is_fetched(load, tmp_path: Path) -> None:
    endless = itertools.cycle(ROWS)
    load.return_value = SimpleNamespace(shuffle=lambda seed: endless)
    file = copy_dataset(NAME, tmp_path, max_bytes=1000)
    assert 1000 <= file.stat().st_size < 1100


def test_chats_of_either_form(load, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x"}]
    turns = [("gpt", "cut"), ("human", "hi"), ("gpt", "yes"), ("system", "s")]
    said = [{"from": who, "value": what} for who, what in turns]
    load.return_value = Rows(
        [{"messages": messages, "source": "a"}, {"conversations": said}]
    )
    file = copy_dataset(NAME, tmp_path, max_bytes=1000)
    first, second = (document.read() for document in find_documents(file))
    assert first == messages
    expected = [("user", "hi"), ("assistant", "yes"), ("system", "s")]
    assert [(m["role"], m["content"]) for m in second] == expected


@pytest.mark.parametrize(
    ("error", "rows", "word"),
    [
        (FileNotFoundError("no such data set\nmore"), [], "no such data set"),
        (ConnectionError("offline"), [], "offline"),
        (None, [{"image": 1}], "row 1 of data set org/text@train has the columns ['im"),
        (None, [ROWS[0], {"text": None}], "row 2"),
        (None, [], "has no rows"),
    ],
)
def test_bad_data_sets(load, tmp_path: Path, error, rows, word) -> None:
    load.side_effect, load.return_value = error, Rows(rows)
    with refused(TrainingError, word, "org/text@train"):
        copy_dataset(NAME, tmp_path / "data", max_bytes=1000)
    assert os.listdir(tmp_path / "data") == []


def test_without_the_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused(TrainingError, "pip install datasets"):
        text_files(["org/text"], tmp_path / "data", max_tokens=100)
    assert not (tmp_path / "data").exists()


def test_a_full_disk(load, tmp_path: Path, full_disk) -> None:
    full_disk()
    with refused(TrainingError, "No space left"):
        copy_dataset(NAME, tmp_path, max_bytes=1000)
    assert os.listdir(tmp_path) == []


def test_a_run_reads_its_copy(load, job: TrainJob, data: Path, monkeypatch) -> None:
    """Trained on a data set, and resumed without asking for it again."""
    load.return_value = Rows(json.loads(line) for line in data.read_text().splitlines())
    job = dataclasses.replace(job, data=["org/text"])
    job.run()
    record = json.loads((Path(job.out) / "training.json").read_text())
    (copy,) = os.listdir(Path(job.out) / "data")
    assert list(record["data_sha256"]["train"]) == [copy]
    load.side_effect = ConnectionError("offline")
    dataclasses.replace(job, overwrite=True).run()
    load.assert_called_once()


def test_calibration_reads_data_sets_too(load, place) -> None:
    load.return_value = Rows(map(json.loads, place["data"].read_text().splitlines()))
    command = COMMANDS["calibrate"].format_map({**place, "data": "org/text@test"})
    assert main.main(command.split()) == 0
    load.assert_called_once_with("org/text", None, split="test", streaming=True)
    acceptance = AcceptanceModel.load(place["prompts"] / "acceptance.json")
    (name,) = acceptance.source["data_sha256"]
    assert name.startswith("org-text-test-")


def test_the_real_library(tmp_path: Path) -> None:
    """Both kinds of local data sets; needs the package."""
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved, "test": saved.select([7])}).save_to_disk(
        str(tmp_path / "splits")
    )
    (tmp_path / "raw").mkdir()
    saved.to_parquet(str(tmp_path / "raw" / "train.parquet"))
    for source, count in (("saved", 50), ("splits@test", 1), ("raw", 50)):
        (file,) = text_files(
            [str(tmp_path / source)], tmp_path / "data", max_tokens=10_000
        )
        texts = sorted(document.read() for document in find_documents(file))
        expected = ROWS if count == 50 else [ROWS[7]]
        assert texts == sorted(row["text"] for row in expected)
