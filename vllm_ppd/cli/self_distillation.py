"""Training text of the model's own answers to prompts, written by a vLLM engine.

Prompt tokens predict what the served model says, so this is the text to train on. The
prompts come from a file, or the model writes them too: where its chat template opens a
user's message, a chat model goes on with what users ask (Magpie, arXiv 2406.08464).
Files of the output folder get a line for each prompt and each answer, in order and
batch by batch: a stopped run goes on after the last whole line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from itertools import cycle, takewhile
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig

from vllm_ppd.cli.engines import engine_processes, engine_settings
from vllm_ppd.files import explained
from vllm_ppd.train.data import DATA_FOLDER, load_tokenizer, text_files
from vllm_ppd.train.documents import RENDERED, find_documents, render_chat
from vllm_ppd.train.model import located_model
from vllm_ppd.train.settings import TrainingError, check_counts

TEMPERATURES = (0.0, 0.7, 1.0)  # of the answers, in turn
BATCH = 128  # prompts; a stopped run loses the answers of one batch
LEAST_PROMPTS = 8  # with fewer, hardly an answer would be held out
LONGEST_PROMPT = 1024  # tokens; little of a longer one is near its answer
OWN_PROMPT = 160  # tokens of a prompt that the model writes itself, at most
WHOLE = {"temperature": 1.0, "skip_special_tokens": False}


def read_prompts(file: Path, tokenizer: Any, longest: int) -> list[str]:
    """What precedes the first answers, as the chat template has it, of at most
    `longest` tokens. Raises TrainingError."""
    prompts: list[str] = []
    for document in find_documents(file):
        chat: Any = document.read()
        chat = [] if isinstance(chat, str) else chat
        messages = list(takewhile(lambda m: m["role"] != "assistant", chat))
        if not messages:
            raise TrainingError(
                f'{document.place} is no prompt; expected "prompt" (a string), "turns" '
                '(a list of strings) or "messages" on every line of a .jsonl file'
            )
        rendered: Any = render_chat(messages, tokenizer, answer_next=True)
        if len(tokenizer.encode(rendered[0], add_special_tokens=False)) <= longest:
            prompts.append(rendered[0])
    if len(prompts) < LEAST_PROMPTS:
        raise TrainingError(
            f"{file} has {len(prompts)} prompts that leave room for an answer (at most "
            f"{longest} tokens); expected {LEAST_PROMPTS}, as some answers are held out"
        )
    return prompts


def write_lines(
    path: Path,
    count: int,
    batch: Callable[[int], tuple[list[dict[str, Any]], int]],
    engine: Any,
    quiet: bool = True,
) -> None:
    """Append what the file lacks of `count` lines; the engine starts if it lacks any.

    `batch` makes more lines, from the number of those there are, and counts tokens.
    Raises TrainingError when the file cannot be written, EngineFailedError.
    """
    with explained(TrainingError, f"{path} cannot be written", "use another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(0)
            written = file.read()
            # A half-written last line goes.
            file.truncate(written.rfind(b"\n") + 1)
            done = written.count(b"\n")
            if done >= count:
                return
            if not quiet:
                print(f"starting vLLM, which writes {path}")
            engine.call("start")
            bar = tqdm(desc=path.stem, total=count, initial=done, disable=quiet)
            while done < count:
                began = time.monotonic()
                lines, tokens = batch(done)
                for line in lines:
                    file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                done += len(lines)
                speed = tokens / (time.monotonic() - began)
                bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
                bar.update(len(lines))
            bar.close()


def write_prompts(
    path: Path, count: int, tokenizer: Any, engine: Any, quiet: bool = True
) -> None:
    """Let the model write `count` messages of a user; as `write_lines`.

    Raises TrainingError without a chat template, or where too few messages end.
    """
    message = [{"role": "user", "content": "@@"}]
    rendered: Any = render_chat(message, tokenizer, answer_next=True)
    before, _, after = rendered[0].partition("@@")
    stop = after.split()[:1]  # usually the mark that ends an answer as well

    def batch(done: int) -> tuple[list[dict[str, Any]], int]:
        size = min(BATCH, 16 + 2 * (count - done))
        ids = engine.call("encode", [before], True) * size
        params = {**WHOLE, "top_p": 0.95, "max_tokens": OWN_PROMPT, "stop": stop}
        written = engine.call("complete", ids, [params] * size)
        texts = [text.strip() for new, text in written if len(new) < OWN_PROMPT]
        prompts = [{"prompt": text} for text in dict.fromkeys(texts) if text]
        if len(prompts) <= size // 8:
            raise TrainingError(
                f"of {size} prompts that the model wrote only {len(prompts)} are of "
                "use; give --self-distill a file of prompts"
            )
        return prompts, sum(len(new) for new, _ in written)

    write_lines(path, count, batch, engine, quiet)


def write_answers(
    path: Path, prompts: list[str], tokens: int, engine: Any, quiet: bool = True
) -> None:
    """Let the model answer the prompts; as `write_lines`."""
    pairs = list(zip(prompts, cycle(TEMPERATURES), strict=False))
    more = {**WHOLE, "max_tokens": tokens, "include_stop_str_in_output": True}

    def batch(done: int) -> tuple[list[dict[str, Any]], int]:
        part, lines = pairs[done : done + BATCH], []
        ids = engine.call("encode", [prompt for prompt, _ in part], True)
        params = [{**more, "temperature": temperature} for _, temperature in part]
        answers = engine.call("complete", ids, params)
        for (prompt, temperature), (_, text) in zip(part, answers, strict=True):
            roles = ((RENDERED, prompt), ("assistant", text))
            chat = [{"role": role, "content": said} for role, said in roles]
            lines.append({"messages": chat, "temperature": temperature})
        return lines, sum(len(new) for new, _ in answers)

    write_lines(path, len(pairs), batch, engine, quiet)


def self_distill(args: argparse.Namespace) -> str:
    """The file with the answers to `args.self_distill`, of which none is missing.

    Raises ValueError subclasses for unusable input, EngineFailedError.
    """
    tokens, folder = args.self_distill_tokens, Path(args.out) / DATA_FOLDER
    check_counts(args, "self_distill_tokens")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise TrainingError("--self-distill must run first without accelerate launch")
    base, model = located_model(args.model, args.model_name)
    config = AutoConfig.from_pretrained(model).get_text_config()
    room = getattr(config, "max_position_embeddings", 1 << 30)
    room = min(room, LONGEST_PROMPT + tokens)
    # Answers beyond --max-tokens would go unread.
    most = max(LEAST_PROMPTS, args.max_tokens // tokens)
    tokenizer, source = load_tokenizer(model), Path(args.self_distill)
    settings, _ = engine_settings(str(model), args.dtype, max_model_len=room)
    prompts = None
    if source.name.isdecimal() and not source.exists():
        most = min(most, int(source.name))
        what = hashlib.sha256(str(base).encode()).hexdigest()
        source = folder / f"prompts-{what[:8]}.jsonl"
        # After a stop, others than before it.
        settings["seed"] = source.stat().st_size if source.exists() else 0
    else:
        (source,) = text_files([args.self_distill], folder, max_tokens=args.max_tokens)
        prompts = read_prompts(source, tokenizer, room - tokens)
    with engine_processes({"vLLM": settings}, "train") as engines:
        engine = engines["vLLM"]
        if prompts is None:
            write_prompts(source, most, tokenizer, engine, args.quiet)
            prompts = read_prompts(source, tokenizer, room - tokens)
        prompts = prompts[:most]
        # The answers to other prompts, or of another model, are another file.
        what = json.dumps([str(base), prompts, tokens, TEMPERATURES])
        what = hashlib.sha256(what.encode()).hexdigest()
        path = folder / f"answers-{what[:8]}.jsonl"
        write_answers(path, prompts, tokens, engine, args.quiet)
    return str(path)
