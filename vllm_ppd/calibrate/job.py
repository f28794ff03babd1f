"""A calibration job from start to finish: read, check, measure, search, write."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_ppd.calibrate.counts import AcceptanceCounts, count_bigrams
from vllm_ppd.calibrate.measure import measure
from vllm_ppd.calibrate.settings import CalibrationSettings
from vllm_ppd.files import explained
from vllm_ppd.hub import resolve_path
from vllm_ppd.prompt_tokens.tokens import PromptTokens, tensor_file
from vllm_ppd.search.acceptance import ACCEPTANCE_FILE, AcceptanceModel
from vllm_ppd.search.menu_search import build_menu
from vllm_ppd.train.data import TokenStream, load_tokenizer, read_stream, text_files
from vllm_ppd.train.documents import sha256_of_files, versions
from vllm_ppd.train.model import FrozenModel, located_model
from vllm_ppd.train.settings import TrainingError
from vllm_ppd.trees.bigram import BIGRAM_FILE, BigramTable
from vllm_ppd.trees.menu import MENU_FILE, TreeMenu, save_menus

# Text beyond this many tokens is left unread.
_MAX_TOKENS = 4_000_000


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The result of a calibration, and the three files that hold it."""

    acceptance: AcceptanceModel
    bigram: BigramTable | None
    variable_rows: TreeMenu
    fixed_rows: TreeMenu

    def save(self, folder: Path) -> None:
        """Write all files, or none: they are renamed once all of them are written.

        Raises TrainingError if the folder cannot be written.
        """
        what = f"the calibration cannot be written to {folder}"
        with explained(TrainingError, what, "choose another folder with --out"):
            with tempfile.TemporaryDirectory(prefix=".calibrate-", dir=folder) as new:
                self.acceptance.save(Path(new, ACCEPTANCE_FILE))
                if self.bigram is not None:
                    self.bigram.save(Path(new, BIGRAM_FILE))
                save_menus(Path(new, MENU_FILE), self.variable_rows, self.fixed_rows)
                for name in os.listdir(new):
                    os.replace(Path(new, name), folder / name)
            if self.bigram is None:
                # The new acceptance probabilities are not those of an earlier table.
                (folder / BIGRAM_FILE).unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class CalibrationJob:
    """What `vllm-ppd calibrate` is asked to do."""

    path: str
    """Folder or hub id of the prompt tokens."""
    model: str
    """Folder or hub id of the model they belong to."""
    data: Sequence[str]
    """Held-out text files (vllm_ppd.train.documents) and data sets
    (vllm_ppd.train.datasets)."""
    settings: CalibrationSettings
    out: str | None = None
    """Folder for the files; `path` if None."""
    overwrite: bool = False
    cpu: bool = False
    """Use no GPU even if there is one."""
    quiet: bool = False

    def run(self) -> tuple[Calibration, Path]:
        """Measure and write; returns the result and the folder of its files.

        Raises ValueError subclasses that name what is wrong with prompt tokens, model,
        data, settings or folder, before the measuring if possible.
        """
        target = self._destination()
        folder = resolve_path(self.path)
        prompts = PromptTokens.load(folder)
        base, model_folder = located_model(self.model)
        warning = prompts.check_against(base)
        if warning and not self.quiet:
            print(f"note: {warning}")
        settings, m, e = self.settings, prompts.num_prompt_tokens, prompts.num_ept
        assert base.vocab_size is not None  # of_folder knows it
        settings.check_fits(m, e, base.vocab_size)
        stream, hashes = self._stream(model_folder)
        gpu = torch.cuda.is_available() and not self.cpu
        model = FrozenModel.load(
            model_folder,
            dtype=settings.dtype,
            device="cuda" if gpu else "cpu",
            max_length=settings.prompt_length + settings.continuation,
        )
        begun = time.monotonic()
        table, stream = self._bigram(model, stream, m)
        counts = AcceptanceCounts(m, settings.ranks, table, e)
        measured = measure(
            model, prompts.embeddings, stream, settings, self.quiet, counts
        )
        acceptance, weights = counts.settled(measured.acceptance(settings.ranks))
        source = {
            "base_model": dataclasses.asdict(base),
            "prompt_tokens_sha256": hashlib.sha256(
                tensor_file(folder).read_bytes()
            ).hexdigest(),
            "data_sha256": hashes,
            "bigram": table is not None,
            "points": measured.num_points,
            "prompts": measured.num_prompts,
            "effective_points": [round(n, 1) for n in measured.effective_points()],
            "top1_half_width_95": measured.half_widths(),
            "settings": dataclasses.asdict(settings),
            "versions": versions("torch", "transformers"),
            "device": model.device.type,
            "seconds": round(time.monotonic() - begun, 1),
        }
        acceptance = dataclasses.replace(acceptance, source=source)
        result = Calibration(
            acceptance,
            None if table is None else dataclasses.replace(table, weights=weights),
            build_menu(acceptance, settings.variable_rows, e),
            build_menu(acceptance, settings.fixed_rows, e, fixed_rows=True),
        )
        result.save(target)
        return result, target

    def _bigram(
        self, model: FrozenModel, stream: TokenStream, num_prompt_tokens: int
    ) -> tuple[BigramTable | None, TokenStream]:
        """The bigram table, and the text that it was not counted on."""
        size = min(self.settings.bigram_entries, model.vocab_size)
        tokens = min(self.settings.bigram_tokens, stream.tokens.numel() // 2)
        rest, first = stream.deal(tokens)
        # Chats measure where the assistant writes, and prompts need room.
        if not size or not tokens or rest.tokens.numel() < self.settings.prompt_length:
            return None, stream
        return count_bigrams(model, first, size, num_prompt_tokens, self.quiet), rest

    def _destination(self) -> Path:
        folder = Path(self.path if self.out is None else self.out).expanduser()
        if self.out is None and not folder.is_dir():
            # Also when it is nothing at all: then this says what is wrong.
            resolve_path(self.path)
            raise TrainingError(
                f"{self.path!r} comes from the hub; name a folder for the files with "
                "--out"
            )
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise TrainingError(
                f"{folder} is no folder that can be written; choose another one with "
                "--out"
            )
        for name in (ACCEPTANCE_FILE, BIGRAM_FILE, MENU_FILE):
            file = folder / name
            if file.is_dir() or (file.exists() and not self.overwrite):
                raise TrainingError(
                    f"{file} exists already; allow replacing it with --overwrite, or "
                    "choose another folder with --out"
                )
        return folder

    def _stream(self, model: Path) -> tuple[TokenStream, dict[str, str]]:
        """The held-out text, and its files' hashes."""
        tokenizer = load_tokenizer(model)
        with tempfile.TemporaryDirectory(prefix="vllm-ppd-") as folder:
            files = text_files(
                self.data, folder, max_tokens=_MAX_TOKENS, quiet=self.quiet
            )
            hashes = sha256_of_files(files)
            stream = read_stream(
                files,
                tokenizer,
                max_tokens=_MAX_TOKENS,
                least_tokens=self.settings.prompt_length,
                seed=self.settings.seed,
                quiet=self.quiet,
            )
        return stream, hashes
