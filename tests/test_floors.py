"""Check that `make floors` tests the versions that pyproject.toml really allows."""

import re

import floors


def test_lower_bounds_become_pins():
    """Every lower bound becomes a pin, in whatever extra it is, and requirements without one do not."""
    lines = ["numpy>=2", "featcli[ray,jxl]", "ruff==0.17.5", "scipy", "pillow-heif>=1", "s3fs[boto3]>=2025.3 ; x"]
    assert floors.lower_bounds(lines) == ["numpy==2", "pillow-heif==1", "s3fs==2025.3"]


def test_the_versions_of_the_tests_are_within_the_bounds():
    """constraints.txt pins nothing below what pyproject.toml allows."""
    text = (floors.REPOSITORY / "constraints.txt").read_text()
    pinned = {
        name.lower().replace("_", "-"): version for name, version in re.findall(r"^([\w-]+)==([\w.]+)", text, re.M)
    }
    bounds = dict(pin.split("==") for pin in floors.lower_bounds(floors.requirements()))
    below = [name for name, bound in bounds.items() if name in pinned and numbers(pinned[name]) < numbers(bound)]
    assert below == []
    assert len(bounds.keys() & pinned.keys()) > 10


def test_a_python_that_does_not_run(tmp_path):
    """A program that only has the name of a Python, as shims have, is not taken for one."""
    shim = tmp_path / "python3.10"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert floors.version_of(str(shim)) is None


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)]
