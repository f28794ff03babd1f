"""A calibration from start to finish: read, check, measure, write."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import vllm_ppd
from vllm_ppd.calibrate.bigram_counts import count_successors
from vllm_ppd.calibrate.counts import AcceptanceCounts
from vllm_ppd.calibrate.measure import Measurement, measure
from vllm_ppd.calibrate.plot import draw
from vllm_ppd.calibrate.settings import CalibrationSettings
from vllm_ppd.files import write_bytes
from vllm_ppd.hub import resolve_model_path, resolve_path
from vllm_ppd.prompt_tokens.fingerprint import BaseModelFingerprint
from vllm_ppd.prompt_tokens.tokens import PromptTokens, tensor_file
from vllm_ppd.search.acceptance import ACCEPTANCE_FILE
from vllm_ppd.search.acceptance_table import AcceptanceStats
from vllm_ppd.search.defaults import ACCEPTANCE_FILE
from vllm_ppd.search.latency import default_profile
from vllm_ppd.train.data import TokenStream, load_tokenizer, read_stream, text_files
from vllm_ppd.train.documents import sha256_of_files
from vllm_ppd.train.model import FrozenModel
from vllm_ppd.train.settings import TrainingError
from vllm_ppd.trees.bigram import BIGRAM_FILE, BigramTable

__all__ = [
    "CalibrationJob",
]

# Text beyond this many tokens is left unread.
_MAX_TOKENS = 4_000_000


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
    """File for the table, ending in .json; acceptance.json in `path` if None."""
    overwrite: bool = False
    cpu: bool = False
    """Use no GPU even if there is one."""
    quiet: bool = False

    def run(self) -> tuple[AcceptanceStats, Path, Path | None]:
        """Measure and write; returns the table, its file, and its plot if there is one.

        Raises ValueError subclasses that name what is wrong with prompt tokens, model,
        data, settings or file, before any measuring where they can be known.
        """
        table_file = self._destination()
        folder = resolve_path(self.path)
        prompts = PromptTokens.load(folder)
        is_folder = os.path.isdir(self.model)
        model_folder = resolve_model_path(self.model)
        base = BaseModelFingerprint.of_folder(
            model_folder,
            name=None if is_folder else self.model,
            revision=None if is_folder else model_folder.name,
        )
        prompts.check_against(base)
        assert base.vocab_size is not None  # of_folder knows it
        self.settings.check_fits(prompts.num_prompt_tokens, base.vocab_size)
        stream, hashes = self._stream(model_folder)
        gpu = torch.cuda.is_available() and not self.cpu
        model = FrozenModel.load(
            model_folder,
            dtype=self.settings.dtype,
            device="cuda" if gpu else "cpu",
            max_length=self.settings.prompt_length + self.settings.continuation,
        )
        begun = time.monotonic()
        table, stream = self._successors(model, stream, prompts.num_prompt_tokens)
        counts = AcceptanceCounts(
            prompts.num_prompt_tokens,
            self.settings.ranks,
            table,
            default_profile("cuda" if gpu else "cpu").curve(1),
            prompts.num_ept,
        )
        found = measure(
            model, prompts.embeddings, stream, self.settings, self.quiet, counts
        )
        content = tensor_file(folder).read_bytes()
        source = {
            "base_model": dataclasses.asdict(base),
            "prompt_tokens_sha256": hashlib.sha256(content).hexdigest(),
            "data_sha256": hashes,
            **_record(found, self.settings),
            "device": model.device.type,
            "seconds": round(time.monotonic() - begun, 1),
        }
        stats = AcceptanceStats(found.acceptance(self.settings.ranks), source)
        stats.save(table_file)
        counts.acceptance(
            {"bigram": table is not None, "points": found.num_points}
        ).save(table_file.with_name(ACCEPTANCE_FILE))
        successor_file = table_file.with_name(BIGRAM_FILE)
        if table is not None:
            replace(table, weights=counts.weights()).save(successor_file)
        else:
            # An earlier one is not what the acceptance is about.
            successor_file.unlink(missing_ok=True)
        return stats, table_file, self._plot(stats, table_file)

    def _successors(
        self, model: FrozenModel, stream: TokenStream, num_prompt_tokens: int
    ) -> tuple[BigramTable | None, TokenStream]:
        """The table, and the text that it has not seen."""
        size = min(self.settings.bigram, model.vocab_size)
        seen = min(self.settings.bigram_tokens, stream.tokens.numel() // 2)
        rest, first = stream.deal(seen)
        # Chats measure where the assistant writes, and prompts need room.
        if not size or not seen or rest.tokens.numel() < self.settings.prompt_length:
            return None, stream
        table = count_successors(model, first, size, num_prompt_tokens, self.quiet)
        return table, rest

    def _destination(self) -> Path:
        if self.out is None:
            if not Path(self.path).expanduser().is_dir():
                # Also when it is nothing at all: then this says what is wrong.
                resolve_path(self.path)
                raise TrainingError(
                    f"{self.path!r} comes from the hub; name a file for the table "
                    "with --out"
                )
            file = Path(self.path).expanduser() / ACCEPTANCE_FILE
        else:
            file = Path(self.out).expanduser()
        if file.suffix != ".json":
            raise TrainingError(
                f"{file} cannot be the table; expected a name ending in .json"
            )
        beside = [file.with_name(name) for name in (ACCEPTANCE_FILE, BIGRAM_FILE)]
        for each in (file, file.with_suffix(".png"), *beside):
            if each.is_dir() or (each.exists() and not self.overwrite):
                raise TrainingError(
                    f"{each} is there already; allow replacing it with --overwrite, or "
                    "choose another file with --out"
                )
        if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
            raise TrainingError(
                f"{file.parent} is no folder that can be written; choose another file "
                "with --out"
            )
        return file

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

    def _plot(self, stats: AcceptanceStats, table_file: Path) -> Path | None:
        file = table_file.with_suffix(".png")
        try:
            # An earlier table's plot would contradict this one.
            file.unlink(missing_ok=True)
            write_bytes(file, draw(stats))
        except ImportError:
            return None
        except OSError as error:
            raise TrainingError(
                f"{table_file} is written, but its plot {file} cannot be: "
                f"{error.strerror}"
            ) from error
        return file


def _record(found: Measurement, settings: CalibrationSettings) -> dict[str, Any]:
    """Everything about a measurement besides the table, as JSON."""
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers")
    }
    return {
        "temperature": settings.temperature,
        "points": found.num_points,
        "prompts": found.num_prompts,
        "effective_points": [round(n, 1) for n in found.effective_points()],
        "top1_half_width_95": found.half_widths(),
        "top1_given_earlier_top1": found.given_earlier(1),
        "top10_given_earlier_top10": found.given_earlier(10),
        "calibration_error": found.reliability.errors(found.num_points),
        "reliability": found.reliability.to_dicts(),
        "settings": dataclasses.asdict(settings),
        "versions": {
            **versions,
            "vllm_ppd": vllm_ppd.__version__,
            "python": platform.python_version(),
        },
    }
