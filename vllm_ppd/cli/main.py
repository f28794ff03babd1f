"""The command `vllm-ppd`: runs a subcommand and prints its errors as sentences.

A subcommand is a module of its name, with `add_arguments(parser)` and `run(args) ->
int`. Only the selected one is imported, so that `vllm-ppd --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from vllm_ppd import __version__
from vllm_ppd.cli.engines import EngineFailedError

# Summary and example of each subcommand, for its help.
COMMANDS = {
    "demo": (
        "compare a model with and without PPD, side by side",
        "vllm-ppd demo --max-tokens 200",
    ),
    "inspect": (
        "show the contents of a prompt-token folder and check that it fits a model",
        "vllm-ppd inspect trained_prompts/demo --model demo_model/model",
    ),
    "train": (
        "train prompt tokens for a model",
        "vllm-ppd train --model MODEL --data TEXTS.jsonl --out PATH --minutes 15",
    ),
    "calibrate": (
        "measure the acceptance of prompt tokens and search the trees to serve",
        "vllm-ppd calibrate PATH --model MODEL --data HELD_OUT.jsonl",
    ),
    "verify": (
        "certify on this machine that a model answers with PPD as it does without",
        "vllm-ppd verify MODEL PATH --out certificate.json",
    ),
    "profile": (
        "measure how long decode steps of a model take on this machine",
        "vllm-ppd profile MODEL PATH --out profile.json",
    ),
    "tree": (
        "show the trees that prompt tokens are served with, and their expected speed",
        "vllm-ppd tree trained_prompts/demo",
    ),
    "convert": (
        "convert prompt tokens from the paper authors' PEFT layout, or into it",
        "vllm-ppd convert hmarkc/ppd-vicuna-7b-v1.3 PATH --model lmsys/vicuna-7b-v1.3",
    ),
}

INTERRUPTED = 130  # what shells report for a command that Ctrl-C ended


def _parser(selected: str | None) -> argparse.ArgumentParser:
    """The whole command line, with the arguments of the selected subcommand only."""
    examples = "\n".join(f"  {example}" for _, example in COMMANDS.values())
    parser = argparse.ArgumentParser(
        prog="vllm-ppd",
        description="Parallel Prompt Decoding (PPD): speculative decoding for vLLM "
        "without a draft model.\nA few trained prompt tokens predict the next tokens; "
        "the model itself verifies them.",
        epilog=f"examples:\n{examples}\n"
        "  vllm serve MODEL --speculative-model ppd:PATH\n\n"
        "PATH is a folder of prompt tokens, or its id on the Hugging Face hub.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"vllm-ppd {__version__}"
    )
    debug: dict[str, Any] = {"action": "store_true"}
    debug["help"] = "Show the traceback of an error."
    parser.add_argument("--debug", **debug)
    subparsers = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND"
    )
    for name, (summary, example) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example: {example}",
        )
        # SUPPRESS keeps a --debug given before the subcommand.
        subparser.add_argument("--debug", default=argparse.SUPPRESS, **debug)
        if name == selected:
            module = importlib.import_module(f"vllm_ppd.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def _run(argv: Sequence[str]) -> int:
    selected = next((word for word in argv if word in COMMANDS), None)
    parser = _parser(selected)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return args.run(args)
    except BrokenPipeError:
        raise
    # An OSError that no command foresees says which file it is about.
    except (ValueError, OSError, EngineFailedError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"vllm-ppd {args.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vllm-ppd ARGV`; returns the exit status.

    0 is success, 1 a failed run (each subcommand says when), 2 unusable input, 130
    Ctrl-C. Other exceptions are bugs and keep their traceback.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`) has left; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
