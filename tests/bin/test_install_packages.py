"""Packages come from where pip is told to look, whether uv installs them or pip."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bin" / "install_packages.py"

Installed = subprocess.CompletedProcess[str]


def write_wheel(folder: Path, version: str, says: str | None = None) -> Path:
    """Writes a wheel of a package that says its version."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"glowworm-{version}.dist-info"
    path = folder / f"glowworm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("glowworm.py", f"print({says or version!r})\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: glowworm\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"glowworm.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Installed]:
    """Installs into a new environment, where pip has been told to look in two folders, and for nothing newer than 2."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    for folder, version in (("one", "1.5"), ("two", "1.25"), ("two", "3")):
        write_wheel(tmp_path / folder, version)
    (tmp_path / "most.txt").write_text("glowworm<2\n", encoding="utf-8")
    (tmp_path / "pip.conf").write_text(
        f"[global]\nno-index = true\nfind-links =\n  {tmp_path}/one\n  {tmp_path}/two\n"
        f"constraint = {tmp_path}/none.txt\n[install]\nconstraint = {tmp_path}/most.txt\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment"], check=True)

    def run(folder: Path, *arguments: str) -> Installed:
        given = [sys.executable, SCRIPT, folder, tmp_path / "environment/bin/python", *arguments]
        return subprocess.run(given, capture_output=True, text=True, timeout=300, check=False)

    return run


def imported(folder: Path) -> str:
    """What the package says when it is imported in the environment of a test."""
    given = [folder / "environment/bin/python", "-c", "import glowworm"]
    return subprocess.run(given, capture_output=True, text=True, check=True).stdout.strip()


def uv_folder() -> Path:
    """Where this environment's packages have been installed from."""
    return Path((Path(sys.prefix) / "stamp").read_text("utf-8").split(" for ")[0]) / "uv"


def test_uv_looks_where_pip_would(install: Callable[..., Installed], tmp_path: Path) -> None:
    result = install(uv_folder(), "glowworm")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert imported(tmp_path) == "1.25"


def test_a_further_index_does_not_come_before_the_first(install: Callable[..., Installed], tmp_path: Path) -> None:
    for name in ("first", "further"):
        wheel = write_wheel(tmp_path / name / "glowworm", "1.25", name)
        (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>', encoding="utf-8")
    first, further = ((tmp_path / name).as_uri() for name in ("first", "further"))
    settings = f"[global]\nindex-url = {first}\nextra-index-url = {further}\n"
    (tmp_path / "pip.conf").write_text(settings, encoding="utf-8")
    result = install(uv_folder(), "glowworm")
    assert (result.returncode, result.stderr) == (0, "")
    assert imported(tmp_path) == "first"


def test_what_uv_does_not_install_pip_does(install: Callable[..., Installed], tmp_path: Path) -> None:
    uv = tmp_path / "broken" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text("#!/bin/sh\nexit 2\n", encoding="utf-8")
    uv.chmod(0o755)
    result = install(tmp_path / "broken", "glowworm")
    assert result.returncode == 0
    assert result.stderr == "bin/install_packages.py: uv did not install glowworm; pip does it\n"
    assert imported(tmp_path) == "1.25"


def test_without_uv_pip_installs(install: Callable[..., Installed], tmp_path: Path) -> None:
    result = install(tmp_path / "nothing", "glowworm==1.5")
    assert result.returncode == 0, result.stderr
    assert imported(tmp_path) == "1.5"


def test_what_neither_finds_is_an_error(install: Callable[..., Installed]) -> None:
    result = install(uv_folder(), "glowworm==3")
    assert result.returncode == 1
    assert "glowworm==3" in result.stderr
