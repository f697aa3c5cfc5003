"""Run the tests with the oldest and the newest versions that pyproject.toml allows: `make floors`.

Two environments are made in build/floors. `lowest` has the oldest Python that is found and the lower bound of every
requirement, `newest` has the newest Python and the newest release of everything. Pythons are looked for as `python3.N`
on PATH and among pyenv's; OLDEST and NEWEST name others. torch brings gigabytes of CUDA unless pip knows an index of
CPU builds, as with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "build" / "floors"
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)")
MOST_MINOR = 30  # the highest 3.N that is looked for
SAID = "torch torchvision timm transformers numpy pillow h5py pyarrow safetensors typer ray".split()


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def requirements() -> list[str]:
    found = project()
    return [*found["dependencies"], *(one for extra in found["optional-dependencies"].values() for one in extra)]


def lower_bounds(lines: Iterable[str]) -> list[str]:
    """Return a pin to the lower bound of each requirement that has one: `numpy>=2` -> `numpy==2`."""
    matches = (REQUIREMENT.fullmatch(line.partition(";")[0].strip()) for line in lines)
    return sorted({f"{found[1]}=={found[2]}" for found in matches if found})


def version_of(python: str) -> tuple[int, int] | None:
    """Return the version of a Python, or None if it does not run, as some shims of pyenv's."""
    code = "import ensurepip, sys; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return tuple(map(int, done.stdout.split())) if done.returncode == 0 else None


def pythons(least: tuple[int, int]) -> Iterator[tuple[tuple[int, int], str]]:
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    names = [f"python3.{minor}" for minor in range(least[1], MOST_MINOR)]
    found = [shutil.which(name) for name in names]
    found += [str(path) for name in names for path in root.glob(f"versions/*/bin/{name}")]
    for path in [sys.executable, *filter(None, found)]:
        version = version_of(path)
        if version is not None and version >= least:
            yield version, path


def environment(name: str, python: str, options: list[str], requirement: str) -> Path:
    """Make an environment, unless it was already made in the same way. Returns its folder of programs."""
    folder, made_of = FOLDER / name, FOLDER / f"{name}.made"
    want = "\n".join([python, *options, *requirements()])
    if not (made_of.is_file() and made_of.read_text() == want):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        by_path = ["--config-settings", "editable_mode=compat"]
        install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *options, "-e", requirement, *by_path], check=True, cwd=REPOSITORY)
        made_of.write_text(want)
    return folder / "bin"


def run(name: str, python: str, options: list[str], arguments: list[str]) -> bool:
    """Return whether all tests pass there."""
    extras = ",".join(project()["optional-dependencies"])
    programs = environment(name, python, options, f".[{extras}]")
    code = (
        "import sys, importlib.metadata as m; print('Python', sys.version.split()[0], *("
        f"f'{{one}} {{m.version(one)}}' for one in {SAID}), sep=', ')"
    )
    print(
        f"{name}:", subprocess.run([programs / "python", "-c", code], check=True, capture_output=True, text=True).stdout
    )
    sys.stdout.flush()
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [programs / "python", "-m", "pytest", *arguments], cwd=REPOSITORY, env={**os.environ, "PATH": path}
    )
    return done.returncode == 0


def main(arguments: list[str]) -> int:
    least = tuple(map(int, project()["requires-python"].removeprefix(">=").split(".")))
    there = sorted(pythons(least))
    oldest, newest = os.environ.get("OLDEST") or there[0][1], os.environ.get("NEWEST") or there[-1][1]
    FOLDER.mkdir(parents=True, exist_ok=True)
    pins = FOLDER / "lowest.txt"
    pins.write_text("\n".join(lower_bounds(requirements())) + "\n")
    passed = [
        run("lowest", oldest, ["-c", str(pins)], arguments),
        run("newest", newest, ["torchvision"], arguments),
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
