"""A model on this machine as explainer and judge: the package's, and a small random one."""

import pytest
import torch
import transformers

from helpers import save_small_model
from olmoscope.errors import UserError
from olmoscope.labelling.answerers import LocalAnswerer
from olmoscope.labelling.endpoint import Failure
from olmoscope.labelling.local_model import NO, YES, LocalModel
from olmoscope.labelling.prompts import load_prompts

PROMPTS = ["Is it?", "A much longer question, with many words in it. " * 6 + "Is it so?", "x", "yes or no"] * 5
CHAT = "{% for m in messages %}<|endoftext|>{{ m['content'] }}<|endoftext|>{% endfor %}Answer:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_model("Llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return LocalModel(str(folder), "cpu")


def test_chances_are_the_softmax_of_the_first_tokens_of_yes_and_no(model, folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model._module.dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chances = model.chances_of_yes(PROMPTS)
    assert chances[:4] == pytest.approx(chances[4:8], abs=5e-3)  # bfloat16's last bits depend on the batch
    for prompt, chance in zip(PROMPTS[:4], chances[:4], strict=True):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] + tokenizer("\nAnswer:")["input_ids"]
        with torch.no_grad():
            shares = theirs(torch.tensor([model._before + ids])).logits[0, -1].double().softmax(0)
        yes, no = (sum(shares[one] for one in {tokenizer(word)["input_ids"][0] for word in words})
                   for words in (YES, NO))
        assert chance == pytest.approx(float(yes / (yes + no)), abs=5e-3)
    assert len(set(chances[:4])) == 4


def test_a_chat_template_is_filled_and_no_text_is_a_control_token(folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(tmp_path)
    model = LocalModel(str(tmp_path), "cpu")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = model._prompt("a <|endoftext|> b")
    assert ids[0] == end and ids.count(end) == 2
    assert tokenizer.decode(ids) == "<|endoftext|>a <|endoftext|> b<|endoftext|>Answer:"


def test_writing_ends_with_the_line_and_is_what_transformers_writes(model, folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model._module.dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([model._prompt("Once upon a time")])
    wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                             pad_token_id=0)[0, ids.shape[1]:]
    text = tokenizer.decode(wanted, skip_special_tokens=True).lstrip().partition("\n")[0].strip()
    assert model.write("Once upon a time", 12) == text


def test_answers_about_features(model):
    answerer = LocalAnswerer(model, load_prompts())
    before = model.prompt_tokens
    chances = answerer.chances("detect", "names\nof animals", ["the cat", "a stock"])
    assert len(chances) == 2 and all(0 < chance < 1 for chance in chances)
    groups = [["a cat", "a dog", "a stock", "a cow", "a horse"], ["a", "b", "c", "d", "e"]]
    named = answerer.intruders("names of animals", groups)
    assert all(one in range(5) for one in named) and named == answerer.intruders("names of animals", groups)
    likelier = answerer.likelier("names of animals", ["cat", "stock"])
    assert len(likelier) == 2 and all(0 < chance < 1 for chance in likelier)
    assert isinstance(answerer.label(["the <<cat>>", "a <<dog>>"], []), str | Failure)
    assert model.prompt_tokens > before and model.revision in answerer.name


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no-such"):
        LocalModel(str(tmp_path / "no-such"), "cpu")
