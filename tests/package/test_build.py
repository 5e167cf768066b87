"""Wheel, sdist and editable install: each holds the whole package once, without links, and works from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

from tests.package.sources import ROOT, modules

BUILD = """
import sys
from setuptools import build_meta
kind, folder = sys.argv[1:]
getattr(build_meta, f"build_{kind}")(folder)
"""
USE = """
import importlib, pkgutil, sys, refreshkv
from refreshkv.cli import EXTRAS
assert refreshkv.__file__.startswith(sys.argv[1]), refreshkv.__file__
found = {module.name for module in pkgutil.walk_packages(refreshkv.__path__, "refreshkv.")}
optional = {module for modules in EXTRAS.values() for module in modules} | {"axolotl"}  # which loads its plugin itself
for name in sorted(found):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] in optional, name

from refreshkv.settings import load_settings
from refreshkv.train.config import RunConfig
from refreshkv.train.deepspeed_json import read_deepspeed_json
from refreshkv.train.experiment.config import ExperimentConfig

run = load_settings(RunConfig, "llama31-8b-8k")
assert read_deepspeed_json(run.training.deepspeed)["zero_optimization"]["stage"] == 3
assert load_settings(RunConfig, "arxiv", folders=("corpora",)).data.row_length == 8192
assert load_settings(ExperimentConfig, "recipes", folders=("experiments",)).output == "runs/recipes"
print(*sorted(found))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that building leaves nothing in it."""
    folder = tmp_path_factory.mktemp("source") / "refreshkv"
    folder.mkdir()
    for name in ("refreshkv", "data", "train", "evaluation", "launch", "configs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(source, kind, folder):
    folder.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD, kind, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.iterdir())


def unpack_wheel(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    assert len(names) == len(set(names))
    return {name for name in names if name.startswith("refreshkv/")}


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The unpacked wheel, and the package's files in it."""
    folder = tmp_path_factory.mktemp("wheel")
    return folder / "unpacked", unpack_wheel(build(source, "wheel", folder / "built"), folder / "unpacked")


PACKAGED = (".py", ".yaml", ".json", "py.typed", ".html", ".css", ".js")


def package_files():
    """The files that an installed package must have."""
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    linked = ("data/", "train/", "evaluation/", "launch/", "configs/")
    files = {name for name in tracked.stdout.split("\n") if name.endswith(PACKAGED)}
    return {name for name in files if name.startswith("refreshkv/") and (ROOT / name).is_file()} | {
        f"refreshkv/{name}" for name in files if name.startswith(linked)
    }


def test_a_wheel_holds_the_whole_package_once(wheel):
    folder, files = wheel
    assert files == package_files()
    assert "refreshkv/py.typed" in files and "refreshkv/configs/suites/paper-table-1.yaml" in files
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    (entry_points,) = folder.glob("*.dist-info/entry_points.txt")
    assert "refreshkv = refreshkv.launch.command:main" in entry_points.read_text()
    metadata = next(folder.glob("*.dist-info/METADATA")).read_text()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not any(name in line for line in needed for name in ("deepspeed", "datasets", "matplotlib", "tensorboard"))


def test_a_wheel_built_from_the_sdist_is_the_same(wheel, source, tmp_path):
    with tarfile.open(build(source, "sdist", tmp_path / "built")) as archive:
        assert not any(member.issym() or member.islnk() for member in archive.getmembers())
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build(unpacked, "wheel", tmp_path / "again")
    assert unpack_wheel(again, tmp_path / "contents") == wheel[1]
    assert not (unpacked / "tests").exists()


def use(folder, cwd, code=""):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu"}
    environment.pop("PYTHONPATH", None)
    # -S leaves out the .pth files of this environment, among them that of the checkout's own editable install
    start = f"import site, sys; sys.path += [{str(folder)!r}, {sysconfig.get_path('purelib')!r}]\n"
    start += f"site.addsitedir({str(folder)!r})\n"
    command = [sys.executable, "-S", "-c", start + (code or USE), str(folder)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_all_of_a_wheel_imports_from_any_folder(wheel, tmp_path):
    done = use(wheel[0], tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[-1].split()) == set(modules()) - {"refreshkv"}


def test_an_editable_install_finds_the_checkout(source, tmp_path):
    wheel = build(source, "editable", tmp_path / "built")
    unpack_wheel(wheel, tmp_path / "site")
    code = "import refreshkv.settings, refreshkv.data.config, refreshkv.launch.command as c; print(c.__file__)"
    done = use(tmp_path / "site", tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(source / "refreshkv" / "launch" / "command.py")
