"""`vllm-ppd convert`: prompt tokens from the authors' PEFT layout, and into it."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder or hub id of prompt tokens, in this project's layout or in the "
        "authors' (adapter_config.json)",
    )
    parser.add_argument(
        "destination", metavar="DST", help="folder to write the other layout into"
    )
    parser.add_argument(
        "--model",
        help="folder or hub id of the base model; required from the authors' layout, "
        "which only names it (of a hub id only the JSON files are fetched)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace prompt tokens that DST has"
    )


def run(args: argparse.Namespace) -> int:
    """Convert as the flags say. Raises ValueError subclasses for unusable input."""
    from vllm_ppd.prompt_tokens.convert import convert

    done = convert(
        args.source, args.destination, model=args.model, overwrite=args.overwrite
    )
    prompts = done.prompts
    layout = "the authors' layout" if done.to_peft else "this project's layout"
    print(
        f"{prompts.num_prompt_tokens} prompt tokens of {prompts.num_ept} EPT for "
        f"{prompts.base.name} are in {args.destination}, in {layout}."
    )
    if done.to_peft and prompts.num_ept > 1:
        print("The authors' code decodes with one EPT only.")
    if not done.to_peft and prompts.base.embedding_sha256 is None:
        print(
            "The model's weights are not at hand, so that only its sizes will tell it "
            "from others; a folder with its safetensors would do."
        )
    print("Acceptance is not carried over: measure it with vllm-ppd calibrate.")
    return 0
