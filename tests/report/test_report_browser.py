"""The page of a report in a browser: no console errors, pictures that can be seen, in light and dark and on a phone."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from hpc.report.report import report
from tests.report.echo_run import make_run
from tests.report.test_timeline import DONE, write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Picture = npt.NDArray[np.uint8]
WIDE, PHONE = (1200, 2400), (500, 3000)
READ = {"light": (0x00, 0x72, 0xB2), "dark": (0x4B, 0xA3, 0xE3)}
GENERATE = {"light": (0x1B, 0x9E, 0x77), "dark": (0x35, 0xB9, 0x8C)}
PAPER = {"light": (0xFF, 0xFF, 0xFF), "dark": (0x15, 0x18, 0x1C)}


@pytest.fixture(scope="module")
def chromium() -> str:
    """A Chromium, installed if it can be."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if not any(map(shutil.which, names)) and shutil.which("apt-get") and os.geteuid() == 0:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", *command], env=environment, check=True, capture_output=True, timeout=500)
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium, and it cannot be installed without apt-get and root")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("page") / "run", DONE)
    assert report([run]) == 0
    return run / "report.html"


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page that has rows too, texts with markup and terminal commands among them."""
    run = make_run(tmp_path_factory.mktemp("answered"))
    assert report([run]) == 0
    return run / "report.html"


def browse(chromium: str, page: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    own = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [chromium, *own, profile, "--virtual-time-budget=3000", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module", params=["light", "dark"])
def theme(request: pytest.FixtureRequest) -> str:
    theme: str = request.param
    return theme


def picture(chromium: str, page: Path, theme: str, size: tuple[int, int]) -> Picture:
    from matplotlib.image import imread

    file = page.with_name(f"{theme}-{size[0]}.png")
    scheme = f"--blink-settings=preferredColorScheme={int(theme == 'light')}"
    browse(chromium, page, f"--screenshot={file}", f"--window-size={size[0]},{size[1]}", scheme)
    return (np.asarray(imread(file))[:, :, :3] * 255).round().astype(np.uint8)


def count(found: Picture, colour: tuple[int, int, int]) -> int:
    return int((np.abs(found.astype(int) - colour) <= 2).all(axis=2).sum())


def test_a_browser_has_nothing_to_complain_of(chromium: str, page: Path) -> None:
    ended = browse(chromium, page, "--dump-dom")
    assert [line for line in ended.stderr.splitlines() if "CONSOLE" in line] == []
    assert ended.stdout.count("<svg") == 3


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_pictures_can_be_seen(chromium: str, page: Path, theme: str, size: tuple[int, int]) -> None:
    # The bars of what two ranks generated fill far more than a line or a swatch of the legend.
    assert count(picture(chromium, page, theme, size), GENERATE[theme]) > 3000


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_page_has_the_paper_of_its_theme(chromium: str, page: Path, theme: str, size: tuple[int, int]) -> None:
    found = picture(chromium, page, theme, size)
    assert tuple(found[5, 5]) == PAPER[theme]
    assert count(found, PAPER[theme]) > 0.5 * size[0] * size[1]


def test_the_lengths_of_prompts_can_be_seen(chromium: str, answered: Path, theme: str) -> None:
    # The bars of the histogram; beside them reading has a sliver of the timeline and a swatch.
    assert count(picture(chromium, answered, theme, WIDE), READ[theme]) > 3000


def test_the_rows_of_a_page_are_text(chromium: str, answered: Path) -> None:
    ended = browse(chromium, answered, "--dump-dom")
    assert "Say &lt;b&gt;hi&lt;/b&gt; &amp; go" in ended.stdout
    assert [line for line in ended.stderr.splitlines() if "CONSOLE" in line] == []
