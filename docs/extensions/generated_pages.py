"""The pages of the reference that are made of the code: commands, and the keys of a recipe.

A page that holds `<!-- generated: NAME -->` gets what `PAGES[NAME]` writes, as Markdown, in its place.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import typer
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.logging import getLogger

from olmoscope.cli.app import app as command_line
from olmoscope.recipe.schema import Recipe

logger = getLogger(__name__)
MARK = re.compile(r"<!-- generated: (\w+) -->")


def commands() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    root = typer.main.get_command(command_line)
    return "\n\n".join(text for name, command in _leaves(root, "olmoscope") for text in _command(name, command))


def _leaves(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    called = [one.metavar or one.name.upper() for one in arguments]
    given = [text if one.required else f"[{text}]" for text, one in zip(called, arguments, strict=True)]
    usage = " ".join([name, *given, *(["[OPTIONS]"] if options else [])])
    yield f"## {name}"
    yield f"```text\n{usage}\n```"
    yield str(command.help)
    if arguments:
        yield _table(["argument", "what"], [[f"`{text}`", one.help or ""] for text, one in
                                            zip(called, arguments, strict=True)])
    if options:
        yield _table(["option", "value", "default", "what"], [
            [", ".join(f"`{text}`" for text in [*one.opts, *one.secondary_opts]), _value(one), _default(one),
             one.help or ""] for one in options])


def _value(option: Any) -> str:
    if option.is_flag:
        return ""
    annotation = option.type_descriptor.annotation
    if choices := getattr(annotation, "__args__", ()):
        choices = [one for one in choices if isinstance(one, str)]
    kind = {"int": "whole number", "float": "number", "Path": "path"}.get(getattr(annotation, "__name__", ""), "text")
    return ", ".join(f"`{one}`" for one in choices) or (f"`{option.metavar}`" if option.metavar else kind)


def _default(option: Any) -> str:
    return "" if option.default is None or option.is_flag else f"`{option.default}`"


def recipe() -> str:
    """Every key of a recipe: its type, its default, what it means."""
    schema = Recipe.model_json_schema()
    return "\n\n".join(_section("", Recipe, schema, schema["$defs"]))


def _section(path: str, model: type[BaseModel], schema: dict[str, Any], defined: dict[str, Any]) -> Iterator[str]:
    """The table of a mapping's keys, then those of the mappings in it."""
    if path:
        yield f"{'###' if re.search(r'[.][a-z]', path) else '##'} {path}"
    yield _paragraph(model.__doc__ or "")
    inner: list[tuple[str, str]] = []
    rows = []
    for key, value in schema["properties"].items():
        names = _mappings(value, defined)
        default = "" if key in schema.get("required", ()) else _plain(value.get("default", {}), names)
        rows.append([f"`{key}`", _type(value, defined), default, described(model, key)])
        each = {"array": ".N", "object": ".NAME"}.get(value.get("type", ""), "")
        inner += [(f"{path}.{key}{each}".lstrip("."), name) for name in names]
    yield _table(["key", "type", "default", "what"], rows)
    for where, name in inner:
        kind = defined[name]["properties"].get("kind", {}).get("const")
        yield from _section(f"{where} ({kind})" if kind else where, MODELS[name], defined[name], defined)


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for one in model.__subclasses__():
        yield one
        yield from _models(one)


MODELS = {one.__name__: one for one in _models(BaseModel) if one.__module__.startswith("olmoscope.recipe")}


def described(model: type[BaseModel], key: str) -> str:
    """What the docstring below a key says; a warning, which fails the build, if it has none."""
    for base in model.__mro__:
        if base.__module__.startswith("olmoscope"):
            found = ModuleAnalyzer.for_module(base.__module__).find_attr_docs().get((base.__name__, key))
            if found:
                return _paragraph("\n".join(found))
    logger.warning("%s.%s has no docstring, so the page of recipe keys does not say what it is", model.__name__, key)
    return ""


def _mappings(value: dict[str, Any], defined: dict[str, Any]) -> list[str]:
    """The names of the mappings that may stand there, but sites, which are texts."""
    found = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
    for key in ("items", "additionalProperties"):
        found += _mappings(value[key], defined) if isinstance(value.get(key), dict) else []
    for part in (*value.get("anyOf", ()), *value.get("oneOf", ())):
        found += _mappings(part, defined)
    return [name for name in found if name != "Site"]


def _type(value: dict[str, Any], defined: dict[str, Any]) -> str:
    if "$ref" in value:
        return "site" if value["$ref"].endswith("/Site") else "mapping"
    if options := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(one, defined) for one in options))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if value.get("type") == "array":
        return "list" if "prefixItems" in value else f"list of {_type(value.get('items', {}), defined)}"
    kind = {"integer": "whole number", "string": "text", "boolean": "true or false",
            "object": "mapping"}.get(value["type"], value["type"])
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {value[name]:g}" for name, sign in signs.items() if name in value]
    return " ".join([kind, *([", ".join(bounds)] if bounds else [])])


def _plain(default: object, mappings: list[str]) -> str:
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if default is None:
        return "`null`"
    return "its defaults" if mappings and default else f"`{default}`"


def _paragraph(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_paragraph(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


PAGES: dict[str, Callable[[], str]] = {"commands": commands, "recipe": recipe}


def fill(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = MARK.sub(lambda found: PAGES[found[1]](), source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}
