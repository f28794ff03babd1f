"""vllm-ppd verify without engines: its prompts and its comparison."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from vllm_ppd.cli import verify


def test_texts_and_chats(tmp_path, tokenizer) -> None:
    lines = [{"text": "four"}, {"prompt": "hi"}, {"turns": ["hi", "and then?"]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    prompts = map(tokenizer.decode, verify.read_prompts(str(file), tokenizer))
    assert list(prompts) == ["four", *["<user>hi\n<assistant>"] * 2]


def test_differences_are_named() -> None:
    plain = {("greedy", 1): [(1, 2), (3, 4)], ("seeded", 1): [(0,), (1,)] * 60}
    ppd = {("greedy", 1): [(1, 2), (3,)], ("seeded", 1): [(0,)] * 120}
    first, *_, last = verify.compare(ppd, plain)["differences"]
    assert first == "greedy, 1 at once, answer 2, token 2: () by PPD, not (4,)"
    assert last == "seeded, token 1: other frequencies"
    assert verify.compare(plain, plain)["result"] == "equal"
    p = verify.chi_square(Counter(a=50, b=49, c=1), Counter(a=60, b=39, d=1))
    assert p == pytest.approx(0.3596, rel=0.01)
