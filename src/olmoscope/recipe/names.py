"""Names of runs: what they may contain, and which names collide. A name is a folder below `runs/`."""

import re
from pathlib import PurePosixPath

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OTHERS = re.compile(r"[^A-Za-z0-9._-]+")


def check_name(name: str) -> str:
    """Return the name unchanged if it is valid.

    Raises:
        ValueError: it cannot be a folder name on every machine.
    """
    if not all(_PART.fullmatch(part) for part in name.split("/")):
        raise ValueError("a name has only letters, digits, - _ and . (and / between its parts), and each part begins "
                         "with a letter or a digit")
    return name


def refuse_colliding_names(names: list[str]) -> None:
    """Refuse names that would not give each run its own folder.

    Raises:
        ValueError: two names are equal apart from upper and lower case, or one is a folder that contains another.
    """
    folders: dict[str, str] = {}
    for name in names:
        if name.lower() in folders:
            before = folders[name.lower()]
            raise ValueError(f"saes: {name} appears twice; give one of the two runs another name" if before == name
                             else f"saes: the names {before} and {name} are one folder if case does not count")
        folders[name.lower()] = name
    for name in names:
        for parent in PurePosixPath(name.lower()).parents:
            if (holds := folders.get(str(parent))) is not None:
                raise ValueError(f"saes: run {name} would be inside the folder of run {holds}; give one of the two "
                                 "another name")


def plain_text(value: object) -> str:
    """A setting's value as part of a name: `1e-3`, `none`, `batchtopk`, `0.9-0.99`, `weight-0.1`.

    A number is written in full, in the shorter of its two notations, so different numbers have different names.
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, dict):
        return "-".join(f"{key}-{plain_text(inner)}" for key, inner in value.items()) or "default"
    if isinstance(value, list):
        return "-".join(map(plain_text, value)) or "none"
    return _OTHERS.sub("-", str(value)) or "empty"


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    plain = repr(value)
    mantissa, _, exponent = f"{value:.16e}".partition("e")
    for digits in range(17):  # find the fewest digits that give the same number
        if float(f"{value:.{digits}e}") == value:
            mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
            break
    scientific = f"{mantissa}e{int(exponent)}"
    return plain if len(plain) <= len(scientific) and "e" not in plain else scientific
