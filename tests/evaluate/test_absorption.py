"""Absorption planted in one word is found there and nowhere else; figures follow the definition; on a real model."""

import numpy as np
import pytest
import torch

from helpers import save_small_model
from olmoscope.errors import UserError
from olmoscope.evaluate import first_letter
from olmoscope.evaluate import last_rows as reading
from olmoscope.evaluate.absorption import absorbed, f1, measure_absorption, split_latents, truth_probes
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.behaviour import Behaviour, _refuse
from olmoscope.evaluate.first_letter import LETTERS, Task, Word, first_letter_task
from olmoscope.evaluate.last_rows import last_rows, rows_after
from olmoscope.evaluate.probing import Probed
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.model.load import load_model
from olmoscope.recipe.schema import Model
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.io import saelens
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.topk import TopK
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer
from release_runs import make_out, recipe_for_tests

EACH, D = 10, 64


def letters_task():
    """Words of every letter, EACH to train on and EACH to test on."""
    words = [Word(number, letter, (), ()) for number, letter in enumerate([*range(26)] * EACH * 2)]
    return Task(words, 26 * EACH, 0)


def letters_rows(task):
    """Each letter has a direction; each word has something of its own."""
    x_ND = 0.1 * torch.randn(len(task.words), D, generator=torch.Generator().manual_seed(0))
    for row, word in enumerate(task.words):
        x_ND[row, word.letter] += 5
    return x_ND


def letters_sae(absorbing=None):
    """A latent for each letter, and one that fires instead of a letter's latent on the word with this row."""
    W_FD = torch.eye(D)[:40].clone()
    encoder_FD, b_F = W_FD.clone(), torch.zeros(40)
    encoder_FD[26:], b_F[26:] = 0, -1  # never
    if absorbing is not None:
        encoder_FD[30], b_F[30] = 20 * absorbing / absorbing.norm(), -15 * absorbing.norm()
        W_FD[30] = absorbing / absorbing.norm()
    return TopK(encoder_FD, W_FD, torch.zeros(D), "none", b_latent=b_F, k=1).at(["layers.1"])


def test_absorption_is_found_where_it_was_planted_and_nowhere_else():
    task = letters_task()
    x_ND = letters_rows(task)
    row = next(row for row, word in enumerate(task.words) if row >= task.train and word.letter == 0)
    x_ND[row, 50] += 5  # this word's own part
    probes = truth_probes(x_ND, task)
    clean = measure_absorption(letters_sae(), x_ND, task, probes, "i")
    assert (clean.fraction, clean.full, clean.latents, clean.counted) == (0, 0, 1, 26)
    assert [one.split for one in clean.letters] == [[letter] for letter in range(26)]
    found = measure_absorption(letters_sae(x_ND[row]), x_ND, task, probes, "i")
    first, *others = found.letters
    assert (first.letter, first.recognised, first.split) == ("a", EACH, [0])
    assert first.full == first.fraction == pytest.approx(1 / EACH)
    assert all(one.fraction == one.full == 0 for one in others)
    assert found.fraction == pytest.approx(1 / EACH / 26) and found.full == pytest.approx(1 / EACH / 26)
    low, high = found.intervals["fraction"]
    assert low == 0 < found.fraction < high


def test_letters_that_the_model_does_not_know_are_left_out_and_said():
    task = letters_task()
    x_ND = letters_rows(task)
    unknown = torch.tensor([word.letter < 3 for word in task.words])
    x_ND[unknown] = 0.1 * torch.randn(int(unknown.sum()), D, generator=torch.Generator().manual_seed(1))
    found = measure_absorption(letters_sae(), x_ND, task, truth_probes(x_ND, task), "i")
    assert found.counted == 23 and found.fraction == 0
    for one in found.letters[:3]:
        assert one.probe_f1 < 0.6 and one.fraction is one.full is None and one.split == []
    nothing = torch.randn(len(task.words), D, generator=torch.Generator().manual_seed(1))
    found = measure_absorption(letters_sae(), nothing, task, truth_probes(nothing, task), "i")
    assert found.counted < 20 and found.fraction is found.full is found.latents is None and found.intervals == {}
    fewer = Task([word for word in task.words if word.letter != 25], 25 * EACH, 0)
    rows = letters_rows(fewer)
    last = measure_absorption(letters_sae(), rows, fewer, truth_probes(rows, fewer), "i").letters[-1]
    assert (last.letter, last.words, last.probe_f1) == ("z", 0, None)


def by_words(sae, x_RD, z_RF, p_D, split):
    """The definition, one word after the other, on dense codes."""
    p_D = p_D / p_D.norm()
    cosine_F = torch.nn.functional.cosine_similarity(sae.W_dec.double(), p_D, dim=1)
    fractions, full = [], []
    for x_D, z_F in zip(x_RD.double(), z_RF.double(), strict=True):
        part_F = z_F * cosine_F * sae.W_dec.double().norm(dim=1)
        projection, main = float(x_D @ p_D), float(part_F[split].sum())
        others = sorted((float(part) for latent, part in enumerate(part_F)
                         if latent not in split and part > 0 and cosine_F[latent] >= 0.1), reverse=True)
        total = sum(others[:3])
        if main >= projection or total / projection < 0.4:
            fractions.append(0.0)
        elif main <= 0:
            fractions.append(1.0)
        else:
            taken = min(total, projection - main)
            fractions.append(min(1.0, max(0.0, taken / (taken + main))))
        top = int(part_F.argmax())
        full.append(bool((z_F[split] < 1e-8).all() and cosine_F[top] >= 0.025 and projection >= 0
                         and part_F[top] / projection >= 0.4))
    return fractions, full


@pytest.mark.parametrize("seed", range(4))
def test_as_defined_word_by_word(seed):
    generator = torch.Generator().manual_seed(seed)
    W_FD = torch.randn(30, 8, generator=generator)
    sae = TopK(W_FD, W_FD, torch.zeros(8), "none", b_latent=torch.zeros(30), k=8)
    p_D = torch.randn(8, generator=generator).double()
    x_RD = 2 * torch.randn(200, 8, generator=generator) + p_D.float()
    codes = sae.encode(x_RD)
    split = torch.nn.functional.cosine_similarity(W_FD.double(), p_D, dim=1).topk(4).indices[2:].tolist()
    fraction_R, full_R = absorbed(sae, x_RD, codes, p_D, split)
    fractions, full = by_words(sae, x_RD, codes.to_dense(), p_D, split)
    assert fraction_R.tolist() == pytest.approx(fractions, abs=1e-6) and full_R.tolist() == full
    assert 0 < sum(full) < 200 and 0 < sum(map(float.__gt__, fractions, [0.0] * 200)) < 200


def test_a_normalised_row_is_measured_in_its_own_space():
    """In a layer-norm SAE, the parts of latents are in units of the row's standard deviation."""
    sae = TopK(torch.eye(8), torch.eye(8), torch.zeros(8), "layer_norm", b_latent=torch.zeros(8), k=8)
    x_RD = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    p_D = torch.randn(8, generator=torch.Generator().manual_seed(1)).double()
    codes = [sae.encode(scale * x_RD) for scale in (1.0, 100.0)]
    found = [absorbed(sae, scale * x_RD, one, p_D, [0]) for scale, one in zip((1.0, 100.0), codes, strict=True)]
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-3, rtol=1e-3)
    assert float(found[0][0].sum()) > 0


def test_a_letter_has_as_many_latents_as_its_probe_needs():
    y_N = torch.arange(400) % 4 == 0
    one_N, two_N = y_N & (torch.arange(400) % 8 == 0), y_N & (torch.arange(400) % 8 == 4)
    z_N3 = torch.stack([one_N, two_N, torch.arange(400) % 3 == 0], dim=1).float()
    values_NK, indices_NK = z_N3.topk(3)
    codes = SparseCodes(values_NK, indices_NK, 12)
    assert split_latents(codes, torch.arange(12), y_N, 200) == [0, 1]
    assert f1(torch.tensor([1.0, 1, -1]), torch.tensor([True, False, True])) == 0.5
    assert f1(torch.tensor([-1.0]), torch.tensor([False])) is None


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "Gemma3"])
def test_words_after_a_prompt_are_read_as_the_whole_text_is(architecture, tmp_path, monkeypatch):
    model = load_model(Model(name=str(save_small_model(architecture, tmp_path)), dtype="float32"),
                       [Site(2), Site(1, "mlp.out")], torch.device("cpu"))
    prompt, ends = list(range(100, 140)), [7, 300, 41]
    whole = last_rows(model, [np.array([*prompt, end]) for end in ends], 64, lambda tokens: None)
    found = reading._after_cache(model, prompt, ends)
    for site, rows in whole.items():
        torch.testing.assert_close(found[site], rows, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(reading, "_after_cache", lambda *_: {site: -rows for site, rows in whole.items()})
    for site, rows in rows_after(model, prompt, ends).items():  # a cache that gives other rows is not used
        torch.testing.assert_close(rows, whole[site], rtol=1e-4, atol=1e-5)


def test_words_and_prompts(monkeypatch):
    monkeypatch.setattr(first_letter, "WORDS", 30)
    tokenizer = load_tokenizer(Model(name="tiny"))
    task = first_letter_task(tokenizer)
    texts = [tokenizer.backend.decode([word.token], skip_special_tokens=False) for word in task.words]
    assert all(text.strip().isalpha() and LETTERS[word.letter] == text.strip()[0].lower()
               for text, word in zip(texts, task.words, strict=True))
    assert len(set(texts)) == len(texts) and 0.7 < task.train / len(texts) < 0.9
    groups = list(task.groups((5,)))
    assert sorted(number for group in groups for number in group.words) == list(range(len(texts)))
    for group in groups:
        assert group.prompt[0] == 5
        *lines, rest = tokenizer.backend.decode(group.prompt[1:], skip_special_tokens=False).split("\n")[1:]
        assert len(lines) == 10 and rest == ""
        part = group.words < task.train
        assert part.all() or not part.any()
        for line in lines:
            word, letter = line.split(" has the first letter: ")
            assert word.strip()[0].upper() == letter
            assert word not in {texts[number] for number in group.words}
            assert (texts.index(word) < task.train) == part.all()


def test_on_a_real_model_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(first_letter, "WORDS", 20)
    W_FD = torch.nn.functional.normalize(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    sae = TopK(W_FD, W_FD, torch.zeros(256), "none", b_latent=torch.zeros(64), k=8).at(["layers.1"])
    saelens.write(sae, tmp_path / "sae", {
        "model_name": "tiny", "hook_name": "blocks.1.hook_resid_post", "context_size": 64, "prepend_bos": False,
        "hf_hook_name": "model.layers.1", "dataset_path": "made", "model_revision": None, "training_tokens": 0})
    (tmp_path / "text.txt").write_text("Some text to measure on. " * 20)
    options = Options(tmp_path / "out", str(tmp_path / "text.txt"), 100, dtype="float32",
                      behaviour=Behaviour(absorption=True))
    [one] = evaluate_anywhere([str(tmp_path / "sae")], options)
    found = read_evaluation(one.folder / EVALUATION).absorption
    assert "".join(letter.letter for letter in found.letters) == LETTERS
    assert found.words == sum(letter.words for letter in found.letters) > 200
    assert found.counted == sum(letter.fraction is not None for letter in found.letters)
    before = (one.folder / EVALUATION).read_bytes()
    monkeypatch.setattr(first_letter, "WORDS", 0)  # nothing is measured again
    evaluate_anywhere([str(tmp_path / "sae")], options)
    assert (one.folder / EVALUATION).read_bytes() == before


def test_what_is_no_sae_of_one_site_is_refused(tmp_path):
    out = make_out(tmp_path / "out", recipe_for_tests(
        "[{reads: [layers.3], writes: [layers.7], d_sae: 96, k: 4, weights: untied}]"))
    subject = open_sae(next((out / "runs").rglob("done.json")).parent)
    with pytest.raises(UserError, match="is not an SAE of one site"):
        _refuse(Probed(subject, tmp_path), Behaviour(absorption=True))
    _refuse(Probed(subject, tmp_path), Behaviour(probing=True))
