"""Chats rendered by the chat template of the recipe's model; what the template drops is detected."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from olmoscope.errors import UserError
from olmoscope.model_errors import first_line
from olmoscope.model_source import pinned, read_tokenizer
from olmoscope.recipe.schema import Model, Text
from olmoscope.text.chat import Rendered, ToText
from olmoscope.text.messages import Message
from olmoscope.text.row import Malformed

_NOW = ("{%- macro strftime_now(format) -%}{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}"
        "{%- endmacro %}")
"""Replaces today's date, which some templates write: the text would differ tomorrow."""

_Form = Callable[[Message], dict[str, Any]]


def template_for(text: Text, model: Model) -> ToText | None:
    """The model's chat template, if a source of the text asks for it.

    Raises:
        UserError: a source asks for it, and the model has none or cannot be loaded.
    """
    asking = [source.name for source in text.sources if getattr(source, "format", None) == "template"]
    if not asking:
        return None
    template = load_template(model)
    if template is None:
        raise UserError(f"source {asking[0]}: the tokenizer of {model.name} has no chat template; use format: chatml "
                        "or plain")
    return template


def load_template(model: Model) -> ToText | None:
    """The chat template of a model; None if it has none.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    model = pinned(model)
    tokenizer = read_tokenizer(model)
    if not tokenizer.chat_template:
        return None
    try:
        return ChatTemplate(tokenizer)
    except ValueError as error:  # several templates, none of them the default
        raise UserError(f"the tokenizer of {model.name}: {first_line(error)}") from error


class ChatTemplate:
    """Renders messages as in the model's training, but without the template's own BOS (`tokens.bos` decides).

    A template may expect content as a string or as parts, and empty content as a missing key or an empty string; it is
    given the form with which it drops least, the first of equals.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.get_chat_template()
        self._template = _NOW + template if "strftime_now" in template else template

    def __call__(self, messages: Sequence[Message]) -> Rendered | Malformed:
        best: Rendered | None = None
        refused: Exception | None = None
        for form in (_with_text, _with_empty_text, _with_parts):
            try:
                rendered = self._render(messages, form)
            except ImportError as error:  # jinja2 is too old
                raise UserError(f"format: template: {first_line(error)}") from error
            except _errors() as error:
                refused = refused or error
                continue
            if best is None or len(rendered[1]) < len(best[1]):
                best = rendered
            if not rendered[1]:
                break
        if best is None:
            assert refused is not None
            return Malformed(f"the chat template rejects it: {first_line(refused)}")
        return best

    def _render(self, messages: Sequence[Message], form: _Form) -> Rendered:
        text = str(self._tokenizer.apply_chat_template([form(message) for message in messages], tokenize=False,
                                                       chat_template=self._template))
        bos = self._tokenizer.bos_token
        if bos and text.startswith(bos):
            text = text.removeprefix(bos)
        return text, tuple(what for message in messages for what in _dropped(message, text))


def _with_text(message: Message) -> dict[str, Any]:
    """The message as most templates expect it: empty keys are left out."""
    form: dict[str, Any] = {**message.given, "role": message.role}
    if message.content or not message.calls:
        form["content"] = message.content
    if message.reasoning:
        form["reasoning_content"] = message.reasoning
    if message.calls:
        form["tool_calls"] = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                              for call in message.calls]
    return form


def _with_empty_text(message: Message) -> dict[str, Any]:
    return {"content": "", **_with_text(message)}


def _with_parts(message: Message) -> dict[str, Any]:
    return _with_text(message) | {"content": [{"type": "text", "text": message.content}]}


def _dropped(message: Message, text: str) -> Iterator[str]:
    """What a message contains but the text lacks, each thing once."""
    yield from dict.fromkeys(message.lost)
    if message.content.strip() not in text:
        yield "content"
    if message.reasoning.strip() not in text:
        yield "reasoning"
    if not all(_is_in(leaf, text) for call in message.calls for leaf in (call.name, *_leaves(call.arguments))):
        yield "tool_calls"
    for key, value in message.given.items():
        if not all(_is_in(leaf, text) for leaf in _leaves(value)):
            yield key


def _leaves(value: object) -> Iterator[str]:
    """The strings in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)


def _is_in(leaf: str, text: str) -> bool:
    """Whether a text contains a string, as it is or as JSON escapes it."""
    return leaf.strip() in text or json.dumps(leaf, ensure_ascii=False)[1:-1] in text or json.dumps(leaf)[1:-1] in text


def _errors() -> tuple[type[Exception], ...]:
    """What a template raises about messages that it rejects."""
    from jinja2 import TemplateError

    return TemplateError, TypeError, ValueError
