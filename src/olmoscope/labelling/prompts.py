"""The texts of prompts, which a user may copy and change, and how text of a corpus is put into them.

A template is a file in `prompts/`; `$name` stands for a value. Text from a corpus may hold anything, so it becomes one
line without control characters, in which `<<` and `>>` are always marks (`one_line`). It may say anything, but it
cannot end a line, forge a mark, or end the message with a control token of a chat template.
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from olmoscope.errors import UserError, did_you_mean
from olmoscope.files import write_text

OPEN, CLOSE = "<<", ">>"
"""Around marked tokens."""
LONGEST_TOKEN = 40
"""Characters of a token that are shown: some vocabularies have tokens of a hundred spaces."""
VALUES: Mapping[str, frozenset[str]] = {
    "explain": frozenset({"examples", "promoted"}), "detect": frozenset({"label", "text"}),
    "fuzz": frozenset({"label", "text"}),
    "intruder": frozenset({"label", "texts"}), "output": frozenset({"label", "tokens"}),
    "local-explain": frozenset({"examples", "promoted"}), "local-detect": frozenset({"label", "text"}),
    "local-fuzz": frozenset({"label", "text"}), "local-intruder": frozenset({"label", "texts"}),
    "local-output": frozenset({"label", "token"})}
"""The templates, and what each may name. `promoted` may be left out."""
_OPTIONAL = {"promoted"}
_FOLDER = Path(__file__).with_name("prompts")
_ANGLES = re.compile(r"<{2,}|>{2,}|^[<>]+|[<>]+$")
_CONTROLS = re.compile(r"<(?=[|\uff5c]|/?(?:s|bos|eos|pad|unk|mask|think|tool_call|start_of_turn|end_of_turn)>)"
                       r"|\[(?=/?(?:INST|SYS|SYSTEM_PROMPT|TOOL_CALLS)\])", re.IGNORECASE)
"""How the control tokens of chat templates begin. Many servers take them for real ones even inside a message."""


@dataclass(frozen=True)
class Prompts:
    """A set of templates."""

    templates: Mapping[str, str]

    def version(self, *names: str) -> str:
        """Identifies some of the templates: 8 hex digits of the SHA-256 of their texts. Each label records it."""
        text = "\0".join(self.templates[name] for name in names)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def fill(self, name: str, **values: str) -> str:
        """A prompt. Values are put in unchanged: `one_line` has already processed the text of a corpus."""
        return Template(self.templates[name]).substitute(values).strip()


def load_prompts(folder: Path | None = None) -> Prompts:
    """The package's templates, or a user's; the package's replace those that the user's folder lacks.

    Raises:
        UserError: no such folder, a file with another name, or a template with an unknown value.
    """
    templates = {name: _read(_FOLDER / f"{name}.txt") for name in VALUES}
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"--prompts {folder}: there is no such folder; `olmoscope label --copy-prompts {folder}` "
                            "makes one to change")
        for path in sorted(folder.glob("*.txt")):
            if path.stem not in VALUES:
                raise UserError(f"{path}: no prompt has this name; there are {', '.join(VALUES)}"
                                f"{did_you_mean(path.stem, VALUES)}")
            templates[path.stem] = _read(path)
            _check(path, templates[path.stem], VALUES[path.stem])
    return Prompts(templates)


def copy_prompts(folder: Path) -> list[Path]:
    """Write the package's templates into a folder, for a user to change.

    Raises:
        UserError: one of the files exists already.
    """
    paths = [folder / f"{name}.txt" for name in VALUES]
    for path in paths:
        if path.exists():
            raise UserError(f"{path} is there already; name another folder")
    for path in paths:
        write_text(path, _read(_FOLDER / path.name))
    return paths


def one_line(tokens: Sequence[str], marked: Collection[int] = ()) -> str:
    """Tokens as one line of a prompt.

    Args:
        marked: which of them are between marks, from 0; neighbours share a pair of marks.
    """
    pieces: list[tuple[bool, str]] = []
    for number, token in enumerate(tokens):
        shown = token if len(token) <= LONGEST_TOKEN else token[:LONGEST_TOKEN] + "…"
        inside = number in marked
        if pieces and pieces[-1][0] == inside:
            pieces[-1] = (inside, pieces[-1][1] + shown)
        else:
            pieces.append((inside, shown))
    return "".join(_between_marks(text) if inside else _escaped(text) for inside, text in pieces).strip()


def plain_label(label: str) -> str:
    """A label, which a model may have written, as one line of a prompt."""
    return one_line([label[at:at + LONGEST_TOKEN] for at in range(0, len(label), LONGEST_TOKEN)])


def numbered(lines: Sequence[str]) -> str:
    """Lines with their numbers, from 1."""
    return "\n".join(f"{number}: {line}" for number, line in enumerate(lines, 1))


def _between_marks(text: str) -> str:
    escaped = _escaped(text, CLOSE)
    if _CONTROLS.match(OPEN[-1] + escaped + CLOSE):  # with the marks around it, a token `s` would be a control token
        escaped = _code_of(escaped[0]) + escaped[1:]
    return f"{OPEN}{escaped}{CLOSE}"


def _escaped(text: str, follows: str = "") -> str:
    text = "".join(sign if sign.isprintable() and sign != "\\" else sign.encode("unicode_escape").decode()
                   for sign in text)
    text = _CONTROLS.sub(lambda found: _code_of(found[0]), text + follows).removesuffix(follows)
    return _ANGLES.sub(lambda found: "".join(f"\\{sign}" for sign in found[0]), text)


def _code_of(sign: str) -> str:
    return f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{ord(sign):04x}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt {path}: {error}") from error


def _check(path: Path, text: str, may: frozenset[str]) -> None:
    template = Template(text)
    if not template.is_valid():
        raise UserError(f"{path}: a $ stands alone; write $$ for a dollar sign")
    named = set(template.get_identifiers())
    if unknown := sorted(named - may):
        raise UserError(f"{path}: there is no ${unknown[0]}; this prompt has "
                        f"{', '.join(f'${one}' for one in sorted(may))}")
    if missing := sorted(may - named - _OPTIONAL):
        raise UserError(f"{path}: ${missing[0]} is missing, so the model would not see it; put it in")
