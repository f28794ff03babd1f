"""The strict reader, once for every JSON format of ours; and atomic writing."""

from __future__ import annotations

import json
import os
import re

import pytest

from vllm_ppd.files import FormatError, read_json, write_json


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
