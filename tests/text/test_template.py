"""Chats rendered by a model's chat template; what a template drops is noticed."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import recipe, save_small_model
from olmoscope.errors import UserError
from olmoscope.recipe.schema import Model
from olmoscope.text.chat import row_of_chat
from olmoscope.text.row import Malformed, Row
from olmoscope.text.template import load_template, template_for

PLAIN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
HERMES = ("{% for m in messages %}<|im_start|>{{ m.role }}\n"
          "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
          "{% for c in m.tool_calls %}<tool_call>"
          "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
          "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}")
PARTS = ("{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
         "{% endfor %}\n{% endfor %}")
ALTERNATE = "{% if messages[0].role != 'user' %}{{ raise_exception('A user must begin') }}{% endif %}" + PLAIN
TALK = [{"role": "user", "content": "weather in Oslo? "},
        {"role": "assistant", "content": None, "reasoning_content": "I must look.", "tool_calls": [
            {"function": {"name": "get_weather", "arguments": '{"city": "Ålesund \\"x\\""}'}}]},
        {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "It rains."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model("Llama", tmp_path_factory.mktemp("template") / "model")


def rendered(folder: Path, template: str | None, messages: Any, **settings: Any) -> Row | Malformed:
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text())
    said.pop("chat_template", None)
    path.write_text(json.dumps(said | settings | ({"chat_template": template} if template else {})))
    to_text = load_template(Model(name=str(folder)))
    assert to_text is not None
    return row_of_chat(messages, "id", "id", to_text)


def test_all_that_is_said_is_rendered(folder: Path) -> None:
    assert rendered(folder, HERMES, TALK) == Row("id", (
        "<|im_start|>user\nweather in Oslo? <|im_end|>\n<|im_start|>assistant\n<think>I must look.</think><tool_call>"
        '{"name": "get_weather", "arguments": {"city": "Ålesund \\"x\\""}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\nIt rains.<|im_end|>\n"), ())


def test_what_a_template_drops_is_noticed(folder: Path) -> None:
    row = rendered(folder, PLAIN, TALK)
    assert isinstance(row, Row) and row.lost == ("reasoning", "tool_calls")
    first_only = "{{ messages[0].content }}"
    row = rendered(folder, first_only, TALK)
    assert isinstance(row, Row) and sorted(row.lost) == ["content", "content", "reasoning", "tool_calls"]
    unknown = [{"role": "user", "content": "Hi", "functions": "def f(): ...", "id": "abc"}]
    row = rendered(folder, PLAIN, unknown)
    assert isinstance(row, Row) and row.lost == ("functions",)
    row = rendered(folder, PLAIN + "{{ messages[0].functions }}", unknown)
    assert isinstance(row, Row) and row.lost == ()


def test_a_template_that_wants_parts_gets_them(folder: Path) -> None:
    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    assert rendered(folder, PARTS, talk) == Row("id", "[user]Hello[assistant]Hi", ())


def test_a_chat_that_a_template_refuses_is_malformed(folder: Path) -> None:
    assert rendered(folder, ALTERNATE, [{"role": "assistant", "content": "Hi"}]) == Malformed(
        "the chat template rejects it: A user must begin")


def test_bos_of_the_template_is_taken_off_and_the_date_stands_still(folder: Path) -> None:
    template = "{{ bos_token }}{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    assert rendered(folder, template, [{"role": "user", "content": "Hi"}], bos_token="<|im_start|>") == Row(
        "id", "26 Jul 2024 2024-07-26 Hi", ())


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    job = recipe(tmp_path, text__sources=[{"kind": "chat", "name": "web", "paths": ["x"], "format": "template"}])
    with pytest.raises(UserError, match="source web: the tokenizer of tiny has no chat template; use format: chatml"):
        template_for(job.text, job.model)
    assert template_for(recipe(tmp_path).text, job.model) is None


def test_several_templates_and_no_default(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text())
    several = [{"name": "rag", "template": PLAIN}, {"name": "tool_use", "template": PLAIN}]
    path.write_text(json.dumps(said | {"chat_template": several}))
    with pytest.raises(UserError, match="has multiple chat templates") as raised:
        load_template(Model(name=str(folder)))
    assert "\n" not in str(raised.value)
