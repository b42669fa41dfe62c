"""What `make gpu-wheels` takes for wanted and for there."""

from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.gpu import fill_wheels

LISTS = [Path(__file__).parents[3] / name for name in fill_wheels.LISTS]


def test_every_line_of_the_lists_is_a_pin():
    lines = [line for path in LISTS for line in path.read_text().splitlines() if line.split("#")[0].strip()]
    found = fill_wheels.pins(LISTS)
    assert [f"{name}=={version}" for name, version in found] == [line.split()[0] for line in lines]
    assert ("transformer-engine-torch", "2.20.2") in found
    assert len({name for name, _ in found}) == len(found)


def test_all_that_setup_installs_is_pinned():
    pinned = {canonicalize_name(name) for name, _ in fill_wheels.pins(LISTS[:2])}
    needed = {canonicalize_name(need.name): name for name in pinned for need in map(Requirement, requires(name) or ())
              if need.marker is None or need.marker.evaluate({"extra": ""})}
    assert {name: by for name, by in needed.items() if name not in pinned} == {}


def test_a_wheel_is_known_by_its_name_and_its_version(tmp_path):
    for name in ("ml_dtypes-0.6.0-cp312-cp312-linux_x86_64.whl", "ruamel.yaml-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert fill_wheels.has(tmp_path, "ml-dtypes", "0.6.0")
    assert fill_wheels.has(tmp_path, "Ruamel-YAML", "1.0")
    assert not fill_wheels.has(tmp_path, "ml-dtypes", "0.6")
    assert not fill_wheels.has(tmp_path, "dtypes", "0.6.0")
