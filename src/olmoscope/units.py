"""Numbers for people."""


def format_count(number: float) -> str:
    """`1.2M`, `400k`: three figures."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def format_bytes(number: float) -> str:
    """`1.5 GB`: decimal units, as disks are sold."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"
