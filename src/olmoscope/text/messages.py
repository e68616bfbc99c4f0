"""Messages of a chat in one form, whatever their keys are called and however they are nested.

This module understands `{role, content}` and ShareGPT's `{from, value}`; content that is a string, a list of parts, or
null; tool calls (`tool_calls`, `function_call`, `function_calls`, parts `tool_use`); reasoning (`reasoning_content`,
`reasoning`, `thinking`, parts of these types); and chats and tool calls given as JSON. It names whatever else a message
has.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from olmoscope.text.row import Malformed

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
          "function_call": "assistant", "function_response": "tool", "observation": "tool"}
"""ShareGPT's role names; others stay as they are."""
_REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
_CALLS = ("tool_calls", "function_call", "function_calls")
_LISTS = ("messages", "conversations", "conversation")
"""Keys under which a mapping may hold a chat."""
_KNOWN = {"role", "content", "from", "value", *_REASONING, *_CALLS}
_NOT_SAID = {"id", "name", "tool_call_id", "call_id", "type", "index", "weight", "train", "loss", "mask", "metadata",
             "timestamp", "created_at", "updated_at", "date", "model", "language", "lang", "status", "score", "hash",
             "token_count", "finish_reason", "stop_reason", "country", "state", "header", "turn_identifier", "redacted",
             "toxic"}
"""Keys that hold metadata about a message, not what it says."""


@dataclass(frozen=True)
class Call:
    """A tool that the assistant calls."""

    name: str
    arguments: Any
    """JSON values; a string if it is not JSON."""


@dataclass
class Message:
    """One message."""

    role: str
    content: str
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    """Other keys of the source that contain text."""
    lost: list[str] = field(default_factory=list)
    """What cannot become text: types of parts such as `image`."""

    @property
    def silent(self) -> bool:
        return not (self.content.strip() or self.reasoning.strip() or self.calls)


def messages_of(value: object) -> list[Message] | Malformed:
    """The messages of a chat.

    Args:
        value: a list of messages, a mapping that has one, or either as JSON.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return Malformed("messages is a text, and not JSON")
    if isinstance(value, Mapping):
        value = next((value[key] for key in _LISTS if value.get(key) is not None), value)
    if not isinstance(value, list):
        return Malformed("messages is missing" if value is None else "messages is not a list")
    messages = []
    for number, given in enumerate(value):
        if not isinstance(given, Mapping):
            return Malformed(f"message {number} is not a mapping")
        message = _message(given)
        if isinstance(message, str):
            return Malformed(f"message {number} {message}")
        messages.append(message)
    return messages


def _message(given: Mapping[str, Any]) -> Message | str:
    """A message, or why it is not one."""
    role = given.get("role") if given.get("role") is not None else given.get("from")
    if not isinstance(role, str):
        return "lacks a text as its role"
    spoken = "content" if given.get("content") is not None or "value" not in given else "value"
    message = Message(_ROLES.get(role, role), "")
    if spoken not in given and not any(given.get(key) for key in (*_REASONING, *_CALLS)):
        return "lacks a text as its content"
    content = given.get(spoken)
    if role == "function_call" and isinstance(content, str):
        message.calls += _calls(content)
    elif isinstance(content, list | Mapping):
        _take_parts(content if isinstance(content, list) else [content], message)
    elif content is not None and not isinstance(content, str):
        return "lacks a text as its content"
    else:
        message.content = content or ""
    for key in _REASONING:
        thoughts = given.get(key)
        if isinstance(thoughts, str) and not message.reasoning:
            message.reasoning = thoughts
        elif thoughts and not isinstance(thoughts, str):
            message.lost.append(key)
    for key in _CALLS:
        message.calls += _calls(given.get(key))
    message.given = {key: value for key, value in given.items() if key not in _KNOWN | _NOT_SAID and _says(value)}
    return message


def _take_parts(parts: list[Any], message: Message) -> None:
    """Distribute the parts of a message's content over its fields."""
    texts = []
    for part in parts:
        if part is None:
            continue
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            message.lost.append(f"part of type {type(part).__name__}")
            continue
        kind, text = part.get("type"), part.get("text")
        thoughts = next((part[key] for key in _REASONING if isinstance(part.get(key), str)), None)
        if kind in _REASONING and isinstance(thoughts or text, str):
            message.reasoning += thoughts or text or ""
        elif kind == "tool_use" or (kind in ("tool_call", "function_call") and "name" in part):
            message.calls.append(Call(str(part.get("name")), _arguments(part.get("input") or part.get("arguments"))))
        elif kind == "tool_result" and part.get("content") is not None:
            inner = part["content"]
            _take_result(inner if isinstance(inner, list) else [inner], message, texts)
        elif isinstance(text, str):
            texts.append(text)
        else:
            message.lost.append(str(kind or "part without a text"))
    message.content = "\n".join(texts)


def _take_result(parts: list[Any], message: Message, texts: list[str]) -> None:
    inner = Message(message.role, "")
    _take_parts(parts, inner)
    texts.append(inner.content)
    message.lost += inner.lost


def _calls(given: object) -> list[Call]:
    """The calls of a message: one or several, as mappings or JSON, with or without `function` around them."""
    if isinstance(given, str):
        if not given.strip():
            return []
        parsed = _parsed(given)
        return [Call("", given)] if isinstance(parsed, str) else _calls(parsed)
    if isinstance(given, list):
        return [call for one in given for call in _calls(one)]
    if not isinstance(given, Mapping) or not _says(given):
        return []
    inner = given.get("function")
    function: Mapping[str, Any] = inner if isinstance(inner, Mapping) else given
    if not isinstance(function.get("name"), str):
        return [Call("", _without_nulls(given))]
    return [Call(function["name"], _arguments(function.get("arguments", function.get("parameters"))))]


def _arguments(given: object) -> Any:
    return _without_nulls(_parsed(given)) if isinstance(given, str) else _without_nulls(given)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_nulls(value: Any) -> Any:
    """The value without null entries: Parquet gives every row all the keys that any row has."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _says(value: object) -> bool:
    """Whether a value contains text."""
    if isinstance(value, Mapping):
        return any(map(_says, value.values()))
    if isinstance(value, list):
        return any(map(_says, value))
    return isinstance(value, str) and bool(value.strip())
