"""Numbers for people."""


def format_count(number: float) -> str:
    """`1.2M`, `400k`: three significant figures."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def format_bytes(number: float) -> str:
    """`1.5 GB`: decimal units, as disks are sold."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB" if number >= 50 or not number else f"{number:.0f} bytes"


def format_seconds(seconds: float) -> str:
    """`0.04 s`, `3.1 s`, `40 s`, `1 min 12 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{round(seconds, 2):.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
