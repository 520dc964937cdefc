"""What an installed scattergen has in it: the library and the templates, and nothing else of the repository."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

FIND_TEMPLATE = (
    "import importlib.resources as r; print((r.files('slurm_templates') / 'default' / 'setup.sh').is_file())"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=240)
    return next(folder.glob("scattergen-*.whl"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The bin folder of a fresh environment with the wheel; what it needs is lent by that of the tests."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True, timeout=120)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_has_no_jobs_and_no_tests(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"hpc", "slurm_templates"}


def test_the_wheel_is_typed(wheel: Path) -> None:
    assert "hpc/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_the_wheel_has_the_source_of_the_kernel(wheel: Path) -> None:
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "hpc").rglob("*.[ch]pp")}
    assert len(sources) == 3
    assert sources <= set(zipfile.ZipFile(wheel).namelist())


def test_templates_are_found_in_a_wheel_install(installed: Path, tmp_path: Path) -> None:
    found = subprocess.run(
        [installed / "python", "-c", FIND_TEMPLATE], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert found.stdout == "True\n"


def test_templates_are_found_in_an_editable_install(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", FIND_TEMPLATE], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert found.stdout == "True\n"


def test_the_command_of_a_wheel_install_works_and_uses_the_wheel(installed: Path, tmp_path: Path) -> None:
    subprocess.run([installed / "scattergen", "--help"], capture_output=True, check=True, cwd=tmp_path, timeout=60)
    where = subprocess.run(
        [installed / "python", "-c", "import hpc; print(hpc.__file__)"], capture_output=True, text=True, cwd=tmp_path
    )
    assert str(installed.parent) in where.stdout
