"""Who may import whom, and what is loaded when."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Ended, finish, start

LAYERS = (
    ("sampling_params", "prompts", "engine_args", "exit", "arrays", "quick_json"),
    ("mpi", "request", "job"),
    ("trim",),
    ("engine",),
    ("rundir",),
    ("corpus",),
    ("model", "output"),
    ("plan", "slurm"),
    ("report", "doctor", "executor"),
    ("forecast",),
    ("pipeline",),
    ("cli", "api"),
    ("__init__", "__main__"),
)
"""From bottom to top. A package imports from lower layers alone, and from itself."""

ONLY_IN = {
    "torch": ("engine/", "model/"),
    "transformers": ("engine/", "model/"),
    "mpi4py": ("mpi/world.py",),
    "vllm": ("engine/vllm/engine.py", "engine/vllm/load.py"),
    "tyro": ("cli/",),
    "submitit": ("slurm/",),
    "rich": ("report/", "forecast/"),
    "matplotlib": ("report/", "forecast/"),
    "scipy": ("forecast/",),
    "huggingface_hub": ("model/find.py",),
    "orjson": ("quick_json.py",),
    "pyarrow": ("corpus/formats/", "output/"),
    "backports": ("corpus/formats/", "output/formats/"),
    "safetensors": ("mpi/comm.py", "engine/", "model/"),
}

PURE = (
    "api/completion", "api/parameters", "api/rows", "arrays", "corpus/chat", "corpus/columns",
    "corpus/decode", "corpus/detect", "corpus/notes", "corpus/openai",
    "corpus/limits", "corpus/row", "corpus/translation", "corpus/turns", "prompts",
    "engine/admission", "engine/bucket", "engine/cost", "engine/extents",
    "engine_args", "forecast/fit", "forecast/simulate", "forecast/step_costs", "job", "output/merge", "plan/arrange",
    "plan/pending", "plan/prefix", "plan/shard", "quick_json", "request", "sampling_params", "trim",
)  # fmt: skip
"""They neither read nor write, and know no clock."""
IMPURE = {"os", "pathlib", "socket", "subprocess", "sys", "time", "logging", "random", "tempfile", "shutil", "glob"}

SOURCES = sorted((ROOT / "hpc").rglob("*.py"))
LAYER_OF = {name: height for height, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path: Path) -> set[str]:
    """The packages that a file imports from."""
    return {name.split(".")[0] for name in imports(path)}


def part(path: Path) -> str:
    """The module that a file is, or the package of modules it belongs to."""
    return path.relative_to(ROOT / "hpc").parts[0].removesuffix(".py")


def own_imports(path: Path) -> set[str]:
    """The parts of hpc that a file imports; a name of the package itself is its `__init__`."""
    names = [name.split(".")[1] for name in imports(path) if name.split(".")[0] == "hpc"]
    return {name if name in LAYER_OF else "__init__" for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_lower_layers_alone(path: Path) -> None:
    own = part(path)
    above = [name for name in own_imports(path) if name != own and LAYER_OF[name] >= LAYER_OF[own]]
    assert above == []


def test_every_module_has_a_layer() -> None:
    assert sorted({part(path) for path in SOURCES}) == sorted(LAYER_OF)


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_in_its_place_alone(package: str) -> None:
    importing = [str(path.relative_to(ROOT / "hpc")) for path in SOURCES if package in packages(path)]
    assert importing
    assert [name for name in importing if not name.startswith(ONLY_IN[package])] == []


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_imports_nothing_of_the_world(name: str) -> None:
    assert packages(ROOT / "hpc" / f"{name}.py") & IMPURE == set()


def test_no_test_patches_names_of_hpc() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    patching = [
        f"{path.name}:{node.lineno}"
        for path in tests
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and (node.attr == "patch" or (node.attr in ("setattr", "setitem") and ast.unparse(node.value) == "monkeypatch"))
    ]
    mocking = [path.name for path in tests if any("mock" in name.split(".") for name in imports(path))]
    assert patching + mocking == []


LOADED = """
import json, runpy, sys

arguments = sys.argv[1:]
code = 0
if arguments:
    sys.argv = ["scattergen", *arguments]
    try:
        runpy.run_module("hpc", run_name="__main__")
    except SystemExit as ending:
        code = ending.code
else:
    import hpc
loaded = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "mpi4py", "matplotlib"})
print(code, loaded)
"""


def loaded_by(*arguments: str) -> Ended:
    return finish(start(["-c", LOADED, *arguments]))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [((), 0), (("--help",), 0), (("run", "--help"), 0), (("verify", "missing"), 2), (("status", "missing"), 2)],
)
def test_neither_torch_nor_mpi_is_loaded_before_it_is_needed(
    tmp_path: Path, arguments: tuple[str, ...], code: int
) -> None:
    ended = loaded_by(*[str(tmp_path / text) if text == "missing" else text for text in arguments])
    assert ended.out.splitlines()[-1] == f"{code} []", ended.err
