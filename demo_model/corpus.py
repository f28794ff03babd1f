"""Text for the demo model: Python sources that every Python installation has.

The standard library and the installed packages of the running interpreter are
read in a seeded order; one file in a hundred, chosen by a hash of its contents,
is held out and never trained on. Licences of the sources stay with their
authors: no source text is redistributed here except short held-out excerpts.

    python demo_model/corpus.py --out build/demo_corpus
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 100
MAX_FILE_BYTES = 200_000
MIN_FILE_BYTES = 600


def source_files() -> list[Path]:
    """All Python files of the standard library and site-packages, sorted."""
    roots = {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}
    files = {p for root in roots for p in Path(root).rglob("*.py") if p.is_file()}
    return sorted(files)


def readable_text(path: Path) -> str | None:
    """The file's text if it looks like code that people wrote, else None."""
    raw = path.read_bytes()
    if not MIN_FILE_BYTES <= len(raw) <= MAX_FILE_BYTES:
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    # Tables of data and generated parsers have very long lines.
    if len(text) / (text.count("\n") + 1) > 100:
        return None
    return text


def is_held_out(text: str) -> bool:
    """Whether a text belongs to the held-out split (depends on its contents only)."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def texts(max_bytes: int, seed: int = 0) -> Iterator[tuple[str, bool]]:
    """Yield (text, held_out) without duplicates until max_bytes have been read."""
    files = source_files()
    random.Random(seed).shuffle(files)
    seen: set[bytes] = set()
    total = 0
    for path in files:
        text = readable_text(path)
        if text is None:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        total += len(text)
        yield text, is_held_out(text)
        if total >= max_bytes:
            return


def write_corpus(out: Path, max_bytes: int, seed: int) -> dict[str, object]:
    """Write train.jsonl, held_out.jsonl and corpus.json into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    counts = {"train": [0, 0], "held_out": [0, 0]}
    with (
        open(out / "train.jsonl.tmp", "w") as train,
        open(out / "held_out.jsonl.tmp", "w") as held_out,
    ):
        for text, held in texts(max_bytes, seed):
            line = json.dumps({"text": text}) + "\n"
            (held_out if held else train).write(line)
            digest.update(line.encode())
            count = counts["held_out" if held else "train"]
            count[0] += 1
            count[1] += len(text)
    for name in ("train", "held_out"):
        (out / f"{name}.jsonl.tmp").rename(out / f"{name}.jsonl")
    about: dict[str, object] = {
        "files_and_characters": counts,
        "seed": seed,
        "sha256": digest.hexdigest(),
    }
    (out / "corpus.json").write_text(json.dumps(about, indent=2) + "\n")
    return about


def excerpts(count: int, size: int = 1600) -> list[str]:
    """Held-out passages of the standard library that start at a definition."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    found = []
    for path in sorted(stdlib.rglob("*.py")):
        if path.is_relative_to(packages) or "site-packages" in path.parts:
            continue
        text = readable_text(path)
        if text is None or not is_held_out(text):
            continue
        starts = [m.start() + 1 for m in re.finditer(r"\n(?=def |class |@)", text)]
        for start in [0, *starts]:
            piece = text[start : start + size]
            if len(piece) == size:
                found.append(piece[: piece.rindex("\n") + 1])
    random.Random(0).shuffle(found)
    return found[:count]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo_corpus"))
    parser.add_argument("--max-bytes", type=int, default=160_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--excerpts", type=Path, help="only write held-out excerpts to this file"
    )
    args = parser.parse_args()
    if args.excerpts:
        lines = [json.dumps({"text": text}) + "\n" for text in excerpts(96)]
        args.excerpts.write_text("".join(lines))
        raise SystemExit
    print(json.dumps(write_corpus(args.out, args.max_bytes, args.seed), indent=2))
