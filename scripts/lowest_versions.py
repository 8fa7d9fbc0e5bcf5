"""Print pip constraints that pin every dependency to the oldest version that pyproject.toml admits.

    python scripts/lowest_versions.py > lowest.txt

`make test-lowest` installs with them and runs the tests, so that the lower bounds are known to work. torch has
the version of constraints.txt: without a pin, pip takes the newest one, whose build for CUDA has several GB.
"""

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def lowest_versions(pyproject: str) -> list[str]:
    """Return a constraint such as `numpy==1.26` for each dependency but torch, and of the extras but `dev` and `docs`.

    Args:
        pyproject: Text of a pyproject.toml (PEP 621).

    Raises:
        ValueError: A dependency has no lower bound.
    """
    project = tomllib.loads(pyproject)["project"]
    extras = {
        name: extra for name, extra in project.get("optional-dependencies", {}).items() if name not in ("dev", "docs")
    }
    pins = []
    for text in dict.fromkeys([*project["dependencies"], *(one for extra in extras.values() for one in extra)]):
        requirement = Requirement(text)
        if requirement.name in ("torch", project["name"]):  # an extra that names other extras has no versions
            continue
        bounds = [one.version for one in requirement.specifier if one.operator in (">=", "==", "~=")]
        if len(bounds) != 1:
            raise ValueError(f"{text}: a dependency needs one lower bound, such as {requirement.name}>=1.0")
        marker = f"; {requirement.marker}" if requirement.marker else ""
        pins.append(f"{requirement.name}=={bounds[0]}{marker}")
    return sorted(pins)


def torch_version(constraints: str) -> str:
    """Return the line of constraints.txt that pins torch."""
    [pin] = re.findall(r"^torch==\S+", constraints, re.MULTILINE)
    return str(pin)


if __name__ == "__main__":
    pins = lowest_versions((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    print("\n".join([*pins, torch_version((ROOT / "constraints.txt").read_text(encoding="utf-8"))]))
