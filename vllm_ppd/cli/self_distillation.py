"""Training text of the model's own answers to prompts, written by a vLLM engine.

Prompt tokens predict what the served model says, so this is the text to train on. A
file of the output folder gets a line for each prompt, in order and batch by batch: a
stopped run goes on after its last whole line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
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
from vllm_ppd.train.settings import TrainingError

TEMPERATURES = (0.0, 0.7, 1.0)  # of the answers, in turn
BATCH = 128  # prompts; a stopped run loses the answers of one batch
LEAST_PROMPTS = 8  # with fewer, hardly an answer would be held out
LONGEST_PROMPT = 1024  # tokens; little of a longer one is near its answer


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


def write_answers(
    path: Path, prompts: list[str], tokens: int, engine: Any, quiet: bool = True
) -> None:
    """Append the answers that the file lacks; the engine starts if there are any.

    Raises TrainingError when the file cannot be written, EngineFailedError.
    """
    pairs = list(zip(prompts, cycle(TEMPERATURES), strict=False))
    marks = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    what = f"{path} cannot be written"
    with explained(TrainingError, what, "choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(0)
            written = file.read()
            # A half-written last line goes.
            file.truncate(written.rfind(b"\n") + 1)
            done = written.count(b"\n")
            if done >= len(pairs):
                return
            if not quiet:
                print(f"starting vLLM, whose answers go into {path}")
            engine.call("start")
            bar = tqdm(desc="answers", total=len(pairs), initial=done, disable=quiet)
            for first in range(done, len(pairs), BATCH):
                part, began = pairs[first : first + BATCH], time.monotonic()
                ids = engine.call("encode", [prompt for prompt, _ in part], True)
                params = [
                    {"temperature": t, "max_tokens": tokens, **marks} for _, t in part
                ]
                answers = engine.call("complete", ids, params)
                for (prompt, temperature), (_, text) in zip(part, answers, strict=True):
                    roles = ((RENDERED, prompt), ("assistant", text))
                    chat = [{"role": role, "content": said} for role, said in roles]
                    line = json.dumps({"messages": chat, "temperature": temperature})
                    file.write(line.encode() + b"\n")
                file.flush()
                speed = sum(len(new) for new, _ in answers) / (time.monotonic() - began)
                bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
                bar.update(len(part))
            bar.close()


def self_distill(args: argparse.Namespace) -> str:
    """The file with the answers to `args.self_distill`, of which none is missing.

    Raises ValueError subclasses for unusable input, EngineFailedError.
    """
    tokens, folder = args.self_distill_tokens, Path(args.out) / DATA_FOLDER
    if tokens < 1:
        raise TrainingError(f"--self-distill-tokens is {tokens}; expected at least 1")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise TrainingError("--self-distill must run first without accelerate launch")
    base, model = located_model(args.model, args.model_name)
    config = AutoConfig.from_pretrained(model).get_text_config()
    room = getattr(config, "max_position_embeddings", 1 << 30)
    room = min(room, LONGEST_PROMPT + tokens)
    (source,) = text_files([args.self_distill], folder, max_tokens=args.max_tokens)
    prompts = read_prompts(source, load_tokenizer(model), room - tokens)
    # Answers beyond --max-tokens would go unread.
    prompts = prompts[: max(LEAST_PROMPTS, args.max_tokens // tokens)]
    # The answers to other prompts, or of another model, are another file.
    what = json.dumps([str(base), prompts, tokens, TEMPERATURES])
    path = folder / f"answers-{hashlib.sha256(what.encode()).hexdigest()[:8]}.jsonl"
    settings, _ = engine_settings(str(model), args.dtype, max_model_len=room)
    with engine_processes({"vLLM": settings}, "train") as engines:
        write_answers(path, prompts, tokens, engines["vLLM"], args.quiet)
    return str(path)
