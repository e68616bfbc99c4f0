"""Prompts: what a user may change, and that text cannot break out of its line."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmoscope.errors import UserError
from olmoscope.labelling.prompts import VALUES, copy_prompts, load_prompts, one_line, plain_label


def parsed(line):
    """A line read back: pieces and whether each is marked. Backslashes escape."""
    pieces, text, inside, at = [], "", False, 0
    while at < len(line):
        if line[at] == "\\":
            known = re.compile(r"\\(x..|u....|U........|[^xuU])").match(line, at)
            sign = known[1]
            text += sign if sign in "<>" else f"\\{sign}".encode().decode("unicode_escape")
            at = known.end()
        elif line.startswith(">>" if inside else "<<", at):
            pieces.append((inside, text))
            text, inside, at = "", not inside, at + 2
        else:
            assert not line.startswith("<<", at) and not line.startswith(">>", at)
            text, at = text + line[at], at + 1
    assert not inside
    return [piece for piece in [*pieces, (inside, text)] if piece[1]]


PIECES = st.one_of(st.sampled_from(["<", ">", "<<", "\\", "\n", " ", "u2028", "<|im_end|>", "</s>", "[INST]", "|",
                                    "/s>", "s", "｜"]),
                   st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=3))


@given(st.lists(st.lists(PIECES, min_size=1, max_size=4).map("".join), max_size=8), st.sets(st.integers(0, 7)))
def test_any_text_stays_one_line_whose_marks_are_ours(tokens, marked):
    tokens = ["a", *tokens, "z"]  # spaces at the ends are cut
    line = one_line(tokens, {number + 1 for number in marked if number + 1 < len(tokens) - 1})
    assert line.isprintable() and not re.search(r"<[|｜]|</?s>|\[INST", line)
    wanted = []
    for number, token in enumerate(tokens):
        inside = 0 < number < len(tokens) - 1 and number - 1 in marked
        if wanted and wanted[-1][0] == inside:
            wanted[-1] = (inside, wanted[-1][1] + token)
        else:
            wanted.append((inside, token))
    assert parsed(line) == wanted


def test_lines():
    assert one_line([" the", " cat", " sat"], {1, 2}) == "the<< cat sat>>"
    assert one_line(["a", "<<", "b"], {2}) == "a\\<\\<<<b>>"
    assert one_line(["x <", "y"], {1}) == "x \\<<<y>>" and one_line(["if a < b"]) == "if a < b"
    assert one_line(["end\nFeature: all\u2028\x1b[0m\ud800"]) == "end\\nFeature: all\\u2028\\x1b[0m\\ud800"
    assert one_line([" " * 200 + "x"]) == "…"
    assert one_line(["<|im_end|> </s> [/INST] <｜User｜>"]) == "\\x3c|im_end|> \\x3c/s> \\x5b/INST] \\x3c｜User｜\\>"
    assert one_line(["a", "|im_end|>", " b"], {1}) == "a<<\\x7cim_end|\\>>> b"
    assert one_line(["a", "/s> c", "｜"], {1}) == "a<<\\x2fs> c>>｜" and one_line(["｜"], {0}) == "<<\\uff5c>>"
    assert one_line(["a", "s", " b"], {1}) == "a<<\\x73>> b" and one_line(["it", "'", "s"]) == "it's"
    assert plain_label("a\n" + "b" * 100 + " >>") == "a\\n" + "b" * 100 + " \\>\\>"


def test_the_package_has_every_prompt_and_fills_it():
    prompts = load_prompts()
    for name, values in VALUES.items():
        filled = prompts.fill(name, **{value: f"({value} $5 $label)" for value in values})
        assert all(f"({value} $5 $label)" in filled for value in values if value != "promoted")
        assert "${" not in filled and "$text)" not in filled
    assert re.fullmatch("[0-9a-f]{8}", prompts.version("detect"))
    assert prompts.version("detect") != prompts.version("fuzz") != prompts.version("detect", "fuzz")


def test_a_user_copies_them_and_changes_one(tmp_path):
    paths = copy_prompts(tmp_path / "mine")
    assert load_prompts(tmp_path / "mine") == load_prompts()
    with pytest.raises(UserError, match="is there already"):
        copy_prompts(tmp_path / "mine")
    for path in paths:
        if path.stem != "detect":
            path.unlink()
    (tmp_path / "mine" / "detect.txt").write_text("Is $label in $text? It costs $$5.")
    mine = load_prompts(tmp_path / "mine")
    assert mine.fill("detect", label="A", text="B") == "Is A in B? It costs $5."
    assert mine.version("detect") != load_prompts().version("detect")
    assert mine.version("fuzz") == load_prompts().version("fuzz")


@pytest.mark.parametrize(("name", "text", "message"), [
    ("detect", "Is $label there?", r"\$text is missing"), ("detect", "$label $text $other", r"there is no \$other"),
    ("detect", "$label $text 5$", "stands alone"), ("detekt", "", "did you mean detect"),
    ("detect", b"\xff", "cannot read")])
def test_prompts_that_cannot_be_used(tmp_path, name, text, message):
    (tmp_path / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        load_prompts(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="--copy-prompts"):
        load_prompts(tmp_path / "none")
