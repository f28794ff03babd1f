"""The strict reader, once for every JSON format of ours; and atomic writing."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from tests.unit.models import DEMO
from vllm_ppd import files
from vllm_ppd.files import FormatError, read_json, write_json
from vllm_ppd.prompt_tokens.tokens import PromptTokens, PromptTokensError
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.menu import load_menus

PROFILE = LatencyProfile((1, 4), (1, 2), ((1.0, 2.0), (2.0, 4.0)), {"model": "a"})


def write_acceptance(folder):
    return shutil.copy(DEMO / "acceptance.json", folder)


def write_menus(folder):
    return shutil.copy(DEMO / "trees.json", folder)


def write_profile(folder):
    PROFILE.save(folder / "profile.json")
    return folder / "profile.json"


def write_prompts(folder):
    shutil.copy(DEMO / "prompt_tokens.safetensors", folder)
    return shutil.copy(DEMO / "config.json", folder)


# (writer, reader, a key without which the file is useless)
FORMATS = {
    "acceptance": (write_acceptance, AcceptanceModel.load, "transitions"),
    "menus": (write_menus, load_menus, "fixed_rows"),
    "profile": (write_profile, LatencyProfile.load, "num_running"),
    "prompts": (write_prompts, lambda p: PromptTokens.load(p.parent), "num_ept"),
}


@pytest.fixture(params=FORMATS)
def case(request, tmp_path):
    """(path, reader, required key) of a good file."""
    writer, reader, key = FORMATS[request.param]
    path = tmp_path / os.path.basename(writer(tmp_path))
    reader(path)
    return path, reader, key


def refused(path, reader, *words: str) -> None:
    with pytest.raises((FormatError, PromptTokensError)) as caught:
        reader(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message, message


@pytest.mark.parametrize("text", ["{", "", "\xff", "[" * 100_000])
def test_not_json(case, text):
    path, reader, _ = case
    path.write_text(text, encoding="latin-1")
    refused(path, reader, "is not JSON")


@pytest.mark.parametrize("text", ["[1]", "3", "{}", '{"format": "ppd_other"}'])
def test_another_format(case, text):
    path, reader, _ = case
    path.write_text(text)
    refused(path, reader, "format 'ppd")


def test_unreadable(case):
    path, reader, _ = case
    path.unlink()
    path.mkdir()
    refused(path, reader)


@pytest.mark.parametrize("version", [99, "1", True, None, 1.0])
def test_another_version(case, version):
    path, reader, _ = case
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format_version": version}))
    refused(path, reader, f"format_version is {version!r}", "reads version")


def test_keys(case):
    path, reader, key = case
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, f"{key}s": 1}))
    refused(path, reader, f"{key}s", f"did you mean '{key}'")
    path.write_text(json.dumps({**content, "zzz": 1}))
    refused(path, reader, "'zzz'")
    del content[key]
    path.write_text(json.dumps(content))
    refused(path, reader, f"'{key}' is missing")


def test_the_message_ends_with_the_remedy(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"format": "ppd_a", "format_version": 2, "x": 1})
    form = {"kind": "the a", "format": "ppd_a", "remedy": "make it again"}
    assert read_json(path, version=2, keys=("x",), **form) == {"x": 1}
    assert read_json(path, version=2, keys=(), optional=("x",), **form) == {"x": 1}
    message = re.escape(f"{path}: format_version is 2; this release reads version 1")
    with pytest.raises(FormatError, match=f"^{message}; make it again$"):
        read_json(path, version=1, keys=("x",), **form)


def test_writing_is_complete_or_leaves_no_trace(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    umask = os.umask(0o027)
    try:
        write_json(path, [1])
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640
    for content, error in ((float("nan"), ValueError), ({1, 2}, TypeError)):
        with pytest.raises(error):
            write_json(path, content)

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, [2])
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "nowhere" / "a.json", [2])
    assert os.listdir(tmp_path) == ["a.json"] and json.loads(path.read_text()) == [1]
