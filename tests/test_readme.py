"""What the README and the pages of docs/ show is what there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_corpus

PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
TEXT = "\n".join(PAGES.values())
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith(("scattergen run", "mpirun ")) and "…" not in line  # what needs a cluster is in tests/slurm
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command: str, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "M").symlink_to(tiny_model)
    write_corpus(tmp_path / "prompts.jsonl", [{"prompt": "once", "sampling": {"max_new_tokens": 4}}])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        command, shell=True, check=True, cwd=tmp_path, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    )
    assert (tmp_path / "runs/prompts/completions.jsonl").read_bytes().count(b"\n") == 1


def test_the_readme_has_commands_to_test() -> None:
    assert len(COMMANDS) >= 2


def test_the_job_file_in_the_readme_is_the_demo() -> None:
    assert (ROOT / "jobs/demo.py").read_text(encoding="utf-8") in PAGES["jobs.md"]


def test_the_script_in_the_readme_is_what_script_prints() -> None:
    assert (ROOT / "tests/golden/demo-default.sbatch").read_text(encoding="utf-8").rstrip("\n") in PAGES["cluster.md"]


def test_every_file_that_a_page_names_is_there() -> None:
    named = set(re.findall(r"\b(?:hpc|jobs|tests|docs)/[\w/-]*\.?\w+", TEXT))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file(page: str) -> None:
    folder = ROOT if page == "README.md" else ROOT / "docs"
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if "://" not in link]
    assert [link for link in links if link and not (folder / link).exists()] == []


def test_every_module_and_package_stands_in_the_table_of_packages() -> None:
    names = [path.name for path in ROOT.glob("hpc/*") if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert [name for name in names if name[0] != "_" and f"`hpc/{name}" not in PAGES["architecture.md"]] == []


def test_the_first_page_leads_to_every_other() -> None:
    assert [page for page in PAGES if page != "README.md" and f"(docs/{page})" not in PAGES["README.md"]] == []


def test_the_first_page_is_a_page() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_every_sampling_parameter_is_on_a_page() -> None:
    import dataclasses

    from hpc import SamplingParams

    assert [f.name for f in dataclasses.fields(SamplingParams) if f"`{f.name}`" not in TEXT] == []


def test_the_demo_corpus_begins_with_the_three_prompts_and_has_64_rows() -> None:
    import json

    rows = [json.loads(line) for line in (ROOT / "jobs/demo.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["messages"][0]["content"] for row in rows[:3]] == [
        "Hello, how are you?",
        "What's the weather like today?",
        "I love programming.",
    ]
    assert len(rows) >= 64
