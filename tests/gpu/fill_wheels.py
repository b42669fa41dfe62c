"""Fill a folder with every wheel that a machine with a CUDA card and no network needs.

    python -m tests.gpu.fill_wheels wheels

Wheels of all requirements files at their exact versions, downloaded, or built where a registry has none:
transformer-engine-torch is compiled for the torch that is installed here, which takes minutes. Each is put into the
folder when it is whole, so a run that was cut off goes on where it was. At the end pip shows that the folder suffices.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

WAYS = ((("requirements.txt", "requirements-dev.txt"), ()),
        (("requirements-demo.txt", "requirements-gpu.txt"), ("--no-deps",)))
"""Lists that are installed together, and how the Makefile has pip install them."""
LISTS = tuple(name for names, _ in WAYS for name in names)
COMPLETE = "complete"
"""File that stands in the folder when nothing is missing."""
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)")


def pins(lists: Iterable[Path]) -> list[tuple[str, str]]:
    """Names and versions of the lists, in their order."""
    lines = (line for path in lists for line in path.read_text(encoding="utf-8").splitlines())
    return [(found[1], found[2]) for found in map(PIN.match, lines) if found]


def has(folder: Path, name: str, version: str) -> bool:
    """Whether the folder holds a wheel of this version."""
    stem = re.sub(r"[-_.]+", "_", name).lower()
    return any(re.sub(r"[-.]", "_", path.name.split("-")[0]).lower() == stem and path.name.split("-")[1] == version
               for path in folder.glob("*.whl"))


def pip(*arguments: str | Path) -> None:
    """Run pip, which prints only what goes wrong; exit with its status where that is not 0."""
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--disable-pip-version-check"])
    if done.returncode:
        sys.exit(done.returncode)


def fetch(folder: Path, name: str, version: str) -> str:
    """Put one wheel into the folder, whole; what was done."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", part, f"{name}=={version}")
        (wheel,) = Path(part).glob("*.whl")
        size = wheel.stat().st_size
        wheel.replace(folder / wheel.name)
    return f"{size / 1e6:,.1f} MB in {time.monotonic() - begin:.0f} s"


def main() -> None:
    """Fill the folder that is named on the command line."""
    folder, lists = Path(sys.argv[1]), [Path(name) for name in LISTS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMPLETE).unlink(missing_ok=True)
    for part in folder.glob(".part-*"):
        shutil.rmtree(part)
    wanted = pins(lists)
    for place, (name, version) in enumerate(wanted, 1):
        told = "there" if has(folder, name, version) else fetch(folder, name, version)
        print(f"[{place:>3}/{len(wanted)}] {name}=={version}: {told}", file=sys.stderr, flush=True)
    for names, more in WAYS:
        pip("install", "--dry-run", "--ignore-installed", "--no-index", "--find-links", folder, *more,
            *(argument for name in names for argument in ("--requirement", name)))
    (folder / COMPLETE).touch()
    total = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{folder}: {len(wanted)} wheels, {total / 1e9:.2f} GB; take it with the repository to the machine with the "
          "card, and run make gpu-check there")


if __name__ == "__main__":
    main()
