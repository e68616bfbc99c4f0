"""Chats become text. What a message contains but its text lacks is named, so that it can be counted."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from olmoscope.text.messages import Call, Message, messages_of
from olmoscope.text.row import Malformed, Row, checked

ToText = Callable[[Sequence[Message]], "Rendered | Malformed"]
"""How messages become text: `hand_rendered` with a format, or a chat template (template.py)."""
Rendered = tuple[str, tuple[str, ...]]
"""The text, and what the chat lost in it (`Row.lost`)."""


def render(messages: Sequence[Message], format: Literal["plain", "chatml"]) -> str:
    """One text from a chat.

    Args:
        format: `plain` gives `role: content` paragraphs; `chatml` gives `<|im_start|>role`, the content and
            `<|im_end|>` for each message. In both, reasoning comes before the content, between `<think>` and
            `</think>`, and each tool call after it, as JSON between `<tool_call>` and `</tool_call>`.
    """
    if format == "plain":
        return "\n\n".join(f"{message.role}: {_said(message)}" for message in messages)
    return "".join(f"<|im_start|>{message.role}\n{_said(message)}<|im_end|>\n" for message in messages)


def hand_rendered(format: Literal["plain", "chatml"]) -> ToText:
    """`render`, with what it loses: parts that are not text, and keys that it does not know."""
    def to_text(messages: Sequence[Message]) -> Rendered:
        return render(messages, format), tuple(
            what for message in messages for what in dict.fromkeys([*message.lost, *message.given]))

    return to_text


def row_of_chat(value: object, row_id: object, fallback_id: str, to_text: ToText) -> Row | Malformed:
    """A row from what should be the messages of a chat (`messages_of`).

    A message whose content is null is rendered as empty. A chat in which no message says anything gives an empty text.
    """
    messages = messages_of(value)
    if isinstance(messages, Malformed):
        return messages
    if all(message.silent for message in messages):
        return checked("", row_id, fallback_id, tuple(
            what for message in messages for what in dict.fromkeys([*message.lost, *message.given])))
    rendered = to_text(messages)
    if isinstance(rendered, Malformed):
        return rendered
    return checked(rendered[0], row_id, fallback_id, rendered[1])


def _said(message: Message) -> str:
    told = not message.reasoning or message.reasoning.strip() in message.content  # some datasets have it twice
    thoughts = "" if told else f"<think>\n{message.reasoning}\n</think>\n\n"
    parts = [thoughts + message.content] if thoughts or message.content or not message.calls else []
    return "\n".join([*parts, *(f"<tool_call>\n{_json(call)}\n</tool_call>" for call in message.calls)])


def _json(call: Call) -> str:
    """`{"name": ..., "arguments": ...}`; a call without a name as it is."""
    value: Any = {"name": call.name, "arguments": call.arguments} if call.name else call.arguments
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
