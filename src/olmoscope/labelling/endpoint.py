"""Requests to an OpenAI-compatible endpoint, and what its answers mean.

A question is one user message whose answer is a JSON object. `Dialect` is the form of request that a server accepts:
not all accept a JSON schema, and newer models have another name for the limit of an answer. `read_answer` trusts
nothing: an answer that is cut off, is not JSON or does not fit is a `Failure` with its reason.
"""

import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from olmoscope.errors import UserError
from olmoscope.labelling.budget import Tokens

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable that holds the key; a key is read from nowhere else."""
SHORTEST_SECRET = 8
"""Characters. Servers on the user's own machine take keys such as `none`, which are also words in answers."""
LONGEST_CONTENT = 50_000
"""Characters of an answer that are searched for JSON."""
LONGEST_MESSAGE = 200
"""The most characters of a server's own words in our messages."""
Form = Literal["schema", "object", "text"]
"""How to ask for the form of an answer: by a JSON schema, as any JSON object, or only in the words of the prompt."""
FORMS: tuple[Form, ...] = ("schema", "object", "text")
A = TypeVar("A", bound=BaseModel)


@dataclass(frozen=True)
class Endpoint:
    """Where questions go."""

    url: str
    """Up to and including `/v1`; `/chat/completions` follows."""
    model: str
    key: str | None = None

    @property
    def chat(self) -> str:
        return f"{self.url}/chat/completions"

    @property
    def sends_key_in_clear(self) -> bool:
        """Whether the key crosses a network unencrypted."""
        parts = urlsplit(self.url)
        return self.key is not None and parts.scheme == "http" and not _is_here(parts.hostname or "")

    def hide_key(self, text: str) -> str:
        """A server's text without the key, in case the server repeats it."""
        return text.replace(self.key, "(the key)") if self.key and len(self.key) >= SHORTEST_SECRET else text


@dataclass(frozen=True)
class Question(Generic[A]):
    """A prompt, and what its answer must be."""

    prompt: str
    answer: type[A]
    longest: int
    """The most tokens of the answer."""


@dataclass(frozen=True)
class Answer(Generic[A]):
    """What a model said, in the requested form."""

    value: A


@dataclass(frozen=True)
class Failure:
    """A question without a usable answer. It counts as failed, never as a score of zero."""

    reason: str
    """Short, and the same for all failures of a kind, which are counted by it."""
    may_pass: bool = False
    """Whether no answer was kept, so that a later run asks again."""


@dataclass(frozen=True)
class Dialect:
    """The form of request that a server accepts."""

    form: Form = "schema"
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: bool = True
    """Whether to ask for temperature 0; some models have no temperature."""

    def body(self, model: str, question: Question[Any]) -> dict[str, Any]:
        """The JSON of a request."""
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question.prompt}],
                                self.limit: question.longest}
        if self.temperature:
            body["temperature"] = 0
        if self.form == "schema":
            body["response_format"] = {"type": "json_schema", "json_schema": {
                "name": "answer", "strict": True, "schema": schema_of(question.answer)}}
        elif self.form == "object":
            body["response_format"] = {"type": "json_object"}
        return body

    def after_refusal(self, message: str, may_change_form: bool) -> tuple["Dialect", str] | None:
        """Another dialect, and the difference in words, for a server that has refused this one; None if its message
        names nothing that could be left out."""
        low = message.lower()
        if "max_completion_tokens" in low and self.limit == "max_tokens":
            return replace(self, limit="max_completion_tokens"), "the limit of an answer as max_completion_tokens"
        if "temperature" in low and self.temperature:
            return replace(self, temperature=False), "no temperature, so answers vary from run to run"
        if may_change_form and self.form != "text" and any(
                word in low for word in ("response_format", "json_schema", "json_object", "schema", "grammar")):
            if self.form == "schema":
                return replace(self, form="object"), "any JSON object, as --answers object does"
            return replace(self, form="text"), "JSON by the prompt's words alone, as --answers text does"
        return None


def endpoint_of(url: str, model: str, environment: Mapping[str, str] = os.environ) -> Endpoint:
    """An endpoint as a user gives it, with the key in the environment, if there is one.

    Raises:
        UserError: it is not a URL, or contains a password or a query.
    """
    parts = urlsplit(url)
    try:
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is not a number
        sound = False
    if not sound:
        raise UserError(f"--endpoint {url}: not the address of an endpoint; give one such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("--endpoint: the address may hold no name, password or query, since it is written down with "
                        f"each label; put the key into the environment variable {KEY_VARIABLE}")
    address = url.rstrip("/").removesuffix("/chat/completions")
    return Endpoint(address, model, environment.get(KEY_VARIABLE) or None)


def schema_of(answer: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a flat answer, with only what all servers support; ranges are checked here, not there."""
    properties = {name: _type_of(field) for name, field in answer.model_json_schema()["properties"].items()}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _type_of(field: dict[str, Any]) -> dict[str, Any]:
    return {"type": field["type"]} | ({"items": _type_of(field["items"])} if "items" in field else {})


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class _Completion(BaseModel):
    """The part of a chat completion that is used. Source: the OpenAI API reference, the chat completion object."""

    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None


def completion_text(text: str) -> str | None:
    """A server's answer in the form that is kept; None if it is not a chat completion (a proxy's page, half an
    answer)."""
    try:
        return _Completion.model_validate_json(text).model_dump_json()
    except ValidationError:
        return None


def usage_of(completion: str) -> Tokens | None:
    """The tokens that an answer reports; None if it reports none."""
    try:
        usage = _Usage.model_validate(_Completion.model_validate_json(completion).usage)
    except ValidationError:
        return None
    return Tokens(usage.prompt_tokens, usage.completion_tokens)


def read_answer(completion: str, question: Question[A]) -> Answer[A] | Failure:
    """What a kept completion says."""
    choice = _Completion.model_validate_json(completion).choices[0]
    if choice.message.refusal or choice.finish_reason == "content_filter":
        return Failure("the model refused to answer")
    if choice.finish_reason == "length":
        return Failure("the answer was cut off at its limit of tokens")
    content = choice.message.content
    if not content or not content.strip():
        return Failure("the answer is empty")
    if len(content) > LONGEST_CONTENT:
        return Failure("the answer is far too long")
    value = json_in(content)
    if value is None:
        return Failure("the answer holds no JSON object")
    try:
        return Answer(question.answer.model_validate(value))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the answer"
        # Names in `loc` of a forbidden extra field are the model's own text.
        known = where if where in question.answer.model_fields else "a field"
        return Failure(f"the answer does not fit its schema: {known}: {first['type']}")


def json_in(text: str) -> dict[str, Any] | None:
    """The last JSON object in a text, which may have reasoning and code fences around it."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    found, at = None, text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found = value
        at = text.find("{", end)
    return found


def server_message(text: str) -> tuple[str, str]:
    """A server's own words about an error, short and in one line; and the error's code, if it has one."""
    try:
        error = json.loads(text)
    except (ValueError, RecursionError):
        return _short(text), ""
    error = error.get("error", error) if isinstance(error, dict) else error
    if isinstance(error, dict):
        return _short(str(error.get("message") or error.get("detail") or error)), str(error.get("code") or "")
    return _short(str(error)), ""


def _short(text: str) -> str:
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + "..."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
