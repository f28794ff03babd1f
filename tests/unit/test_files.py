"""The strict reader, once for every JSON format of ours; and atomic writing."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from tests.unit.models import DEMO
from tests.unit.refusals import refused
from vllm_ppd.files import FormatError, read_json, write_json
from vllm_ppd.prompt_tokens.tokens import PromptTokens, PromptTokensError
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import LatencyProfile
from vllm_ppd.trees.menu import load_menus

PROFILE = LatencyProfile((1, 4), (1, 2), ((1.0, 2.0), (2.0, 4.0)), {"model": "a"})


def copy_demo(*names):
    """A writer of files of the demo's prompt tokens; the last one is read."""
    return lambda folder: [shutil.copy(DEMO / name, folder) for name in names][-1]


def write_profile(folder):
    PROFILE.save(folder / "profile.json")
    return folder / "profile.json"


# (writer, reader, a key without which the file is useless)
FORMATS = {
    "acceptance": (copy_demo("acceptance.json"), AcceptanceModel.load, "transitions"),
    "menus": (copy_demo("trees.json"), load_menus, "fixed_rows"),
    "profile": (write_profile, LatencyProfile.load, "num_running"),
    "prompts": (
        copy_demo("prompt_tokens.safetensors", "config.json"),
        lambda path: PromptTokens.load(path.parent),
        "num_ept",
    ),
}


@pytest.fixture(params=FORMATS)
def case(request, tmp_path):
    """(path, reader, required key) of a good file."""
    writer, reader, key = FORMATS[request.param]
    path = tmp_path / os.path.basename(writer(tmp_path))
    reader(path)
    return path, reader, key


def unusable(path, reader, *words: str) -> None:
    with refused((FormatError, PromptTokensError), path, *words):
        reader(path)


@pytest.mark.parametrize("text", ["{", "", "\xff", "[" * 100_000])
def test_not_json(case, text):
    path, reader, _ = case
    path.write_text(text, encoding="latin-1")
    unusable(path, reader, "is not JSON")


@pytest.mark.parametrize("text", ["[1]", "3", "{}", '{"format": "ppd_other"}'])
def test_another_format(case, text):
    path, reader, _ = case
    path.write_text(text)
    unusable(path, reader, "format 'ppd")


def test_unreadable(case):
    path, reader, _ = case
    path.unlink()
    path.mkdir()
    unusable(path, reader)


@pytest.mark.parametrize("version", [99, "1", True, None, 1.0])
def test_another_version(case, version):
    path, reader, _ = case
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format_version": version}))
    unusable(path, reader, f"format_version is {version!r}", "reads version")


def test_keys(case):
    path, reader, key = case
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, f"{key}s": 1}))
    unusable(path, reader, f"{key}s", f"did you mean '{key}'")
    path.write_text(json.dumps({**content, "zzz": 1}))
    unusable(path, reader, "'zzz'")
    del content[key]
    path.write_text(json.dumps(content))
    unusable(path, reader, f"'{key}' is missing")


def test_the_message_ends_with_the_remedy(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"format": "ppd_a", "format_version": 2, "x": 1})
    form = {"kind": "the a", "format": "ppd_a", "remedy": "make it again"}
    assert read_json(path, version=2, keys=("x",), **form) == {"x": 1}
    assert read_json(path, version=2, keys=(), optional=("x",), **form) == {"x": 1}
    message = re.escape(f"{path}: format_version is 2; this release reads version 1")
    with pytest.raises(FormatError, match=f"^{message}; make it again$"):
        read_json(path, version=1, keys=("x",), **form)


def test_writing_is_complete_or_leaves_no_trace(tmp_path, full_disk):
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
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        write_json(path, [2])
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "nowhere" / "a.json", [2])
    assert os.listdir(tmp_path) == ["a.json"] and json.loads(path.read_text()) == [1]
