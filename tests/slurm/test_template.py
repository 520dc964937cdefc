"""A site profile is found where the user has it, read whole, and refused with the reason if it cannot be used."""

from pathlib import Path

import pytest

from hpc.exit import Refusal
from hpc.slurm.template import PACKAGE, SiteProfile, find_profile, read_profile

SHIPPED = ("apptainer", "default", "openmpi")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a current folder with nothing in them."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "site"
    made.mkdir()
    return made


def directives(folder: Path, text: str) -> Path:
    (folder / "directives.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", SHIPPED)
def test_a_template_of_the_package_is_found_by_its_name(name: str) -> None:
    assert find_profile(name) == PACKAGE / name


def test_the_package_brings_these_templates() -> None:
    assert tuple(sorted(path.name for path in PACKAGE.iterdir())) == SHIPPED


def test_one_in_the_current_folder_goes_before_the_packages() -> None:
    Path("slurm_templates/default").mkdir(parents=True)
    assert find_profile("default").absolute() == Path.cwd() / "slurm_templates" / "default"


def test_one_in_the_users_configuration_goes_before_the_packages(home: Path) -> None:
    own = home / ".config/scattergen/slurm_templates/default"
    own.mkdir(parents=True)
    assert find_profile("default") == own


def test_xdg_config_home_says_where_the_users_configuration_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    own = tmp_path / "xdg/scattergen/slurm_templates/mine"
    own.mkdir(parents=True)
    assert find_profile("mine") == own


def test_one_in_the_current_folder_goes_before_the_users_configuration(home: Path) -> None:
    (home / ".config/scattergen/slurm_templates/mine").mkdir(parents=True)
    Path("slurm_templates/mine").mkdir(parents=True)
    assert find_profile("mine") == Path("slurm_templates/mine")


def test_a_name_with_a_slash_is_a_folder(folder: Path) -> None:
    assert find_profile(str(folder)) == folder


def test_a_folder_may_begin_with_a_tilde(home: Path) -> None:
    (home / "site").mkdir()
    assert find_profile("~/site") == home / "site"


def test_an_unknown_template_is_refused_naming_those_of_the_package() -> None:
    with pytest.raises(Refusal, match=r"\"slurm.template\" is 'nowhere'.* brings apptainer, default, openmpi$"):
        find_profile("nowhere")


def test_an_unknown_template_is_refused_naming_the_folders_where_it_could_be(home: Path) -> None:
    with pytest.raises(Refusal) as caught:
        find_profile("nowhere")
    assert "slurm_templates/nowhere, " in str(caught.value)
    assert f"{home}/.config/scattergen/slurm_templates/nowhere" in str(caught.value)


def test_an_empty_folder_is_a_template_for_mpich(folder: Path) -> None:
    assert read_profile(folder) == SiteProfile((), (), {}, "pmi2", None, ())


def test_shell_stands_as_it_is_but_for_its_first_line_and_what_is_for_shellcheck(folder: Path) -> None:
    (folder / "setup.sh").write_text("#!/bin/sh\n# shellcheck disable=SC1091\n# Why.\n\n. env.sh  # ü\n  #!\n")
    assert read_profile(folder).setup == ("# Why.", "", ". env.sh  # ü", "  #!")


def test_teardown_is_read_like_setup(folder: Path) -> None:
    (folder / "teardown.sh").write_text("#!/bin/sh\ntrue\n")
    assert read_profile(folder).teardown == ("true",)


def test_directives_are_those_of_submitit(folder: Path) -> None:
    directives(folder, 'partition = "gpu"\ngpus_per_node = 4\n[additional_parameters]\nlicenses = "a:1"\n')
    expected = {"partition": "gpu", "gpus_per_node": 4, "additional_parameters": {"licenses": "a:1"}}
    assert read_profile(folder).directives == expected


def test_what_is_not_submitits_is_not_among_the_directives(folder: Path) -> None:
    found = read_profile(directives(folder, 'mpi = "pmix"\npython = "py"\nsrun_args = ["--a", "b"]\n'))
    assert (found.mpi, found.python, found.srun_args, found.directives) == ("pmix", "py", ("--a", "b"), {})


def test_unknown_directives_are_refused_naming_the_known(folder: Path) -> None:
    with pytest.raises(Refusal) as caught:
        read_profile(directives(folder, 'partitoin = "gpu"\nlicenses = "a"\n'))
    assert "directives.toml: licenses, partitoin is none of account, additional_parameters, " in str(caught.value)
    assert "other options of sbatch stand under [additional_parameters]" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["job_name", "wckey", "stderr_to_stdout", "setup", "teardown", "use_srun", "array_parallelism"]
)
def test_what_the_script_itself_is_made_of_is_no_directive(folder: Path, name: str) -> None:
    with pytest.raises(Refusal, match=f"{name} is none of account, "):
        read_profile(directives(folder, f"{name} = 1\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mpi = 2", "text"),
        ('python = ["python"]', "text"),
        ('srun_args = "--cpu-bind=cores"', "a list of texts"),
        ("srun_args = [1]", "a list of texts"),
        ('time = "1:00:00"', "an integer"),
        ('nodes = "2-4"', "an integer"),
        ('gpus_per_node = "a100:4"', "an integer"),
        ('additional_parameters = "--licenses=a"', "a table"),
    ],
)
def test_a_directive_of_another_type_is_refused_with_its_name(folder: Path, text: str, words: str) -> None:
    with pytest.raises(Refusal, match=rf'directives\.toml: "{text.split()[0]}" is .*; it must be {words}$'):
        read_profile(directives(folder, text))


def test_what_is_no_toml_is_refused_with_the_line(folder: Path) -> None:
    with pytest.raises(Refusal, match=r"directives\.toml: .*line 2"):
        read_profile(directives(folder, 'mpi = "pmi2"\npartition gpu\n'))


def test_a_file_that_is_no_text_is_refused_with_its_name(folder: Path) -> None:
    (folder / "setup.sh").write_bytes(b"\xff\xfe")
    with pytest.raises(Refusal, match=r"setup\.sh cannot be read"):
        read_profile(folder)


@pytest.mark.parametrize(("name", "mpi"), [("default", "pmi2"), ("openmpi", "pmix"), ("apptainer", "pmi2")])
def test_a_template_of_the_package_is_for_its_mpi(name: str, mpi: str) -> None:
    assert read_profile(PACKAGE / name).mpi == mpi


@pytest.mark.parametrize("name", SHIPPED)
def test_a_template_of_the_package_asks_for_nothing_that_a_site_may_not_have(name: str) -> None:
    assert read_profile(PACKAGE / name).directives == {"additional_parameters": {}}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_line_of_directives_that_a_site_may_want_to_use_can_be_used(folder: Path, name: str) -> None:
    text = (PACKAGE / name / "directives.toml").read_text(encoding="utf-8")
    used = [line.removeprefix("# ") if " = " in line.partition("  ")[0] else line for line in text.splitlines()]
    assert len(read_profile(directives(folder, "\n".join(used))).directives) > 8
