"""What is wrong with a recipe, in one line that names the key."""

from pydantic import BaseModel, ValidationError


def first_mistake(error: ValidationError) -> str:
    """The first thing wrong, by the path of its key, in one line."""
    mistakes = error.errors()
    first = mistakes[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        message = "unknown key; look for a typo"
    elif first["type"] == "missing":
        message = "missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        if not isinstance(first["input"], dict | list | BaseModel):
            message += f" (it says {first['input']!r})"
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return f"{key}: {message}{more}" if key else f"{message}{more}"
