"""The first-letter task: words that are one token each, and the few-shot prompts in front of them.

A prompt is ten lines such as `cat has the first letter: C` and the start of one more. The row measured is the one at
the word itself; nothing after the word is needed, since attention is causal. The task is that of SAEBench (arXiv
2503.09532), except that words share prompts in groups: a group's ten examples are drawn for all its words.
"""

import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olmoscope.evaluate.last_rows import rows_after
from olmoscope.model.load import LoadedModel
from olmoscope.progress import bar
from olmoscope.seeds import generator
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import Tokenizer
from olmoscope.tokens.vocabulary import token_texts

LETTERS = string.ascii_lowercase
LINE = "\n{word} has the first letter: {letter}"
EXAMPLES = 10
WORDS = 250
"""Words per letter at most, drawn from the vocabulary."""
TEST_SHARE = 0.2
GROUP = 128
"""Most words that share ten examples."""


@dataclass(frozen=True)
class Word:
    """A token that has only letters, perhaps after a space."""

    token: int
    letter: int
    """Index of its first letter; 0 is a."""
    before: tuple[int, ...]
    """The tokens before it in its line."""
    after: tuple[int, ...]
    """The tokens after it in its line, including the answer."""


@dataclass(frozen=True)
class Group:
    """Words that follow one prompt."""

    prompt: tuple[int, ...]
    words: np.ndarray
    """`[n]`, indices of words."""


@dataclass(frozen=True)
class Task:
    """The words and their prompts.

    Attributes:
        words: all words, training words first.
        train: number of training words.
        left_out: number of drawn words that do not stay one token in their line.
    """

    words: list[Word]
    train: int
    left_out: int

    def groups(self, begin: tuple[int, ...]) -> Iterator[Group]:
        """All words in groups; a group's examples come from the same part, training or test, but not from the group
        itself.

        Args:
            begin: the tokens with which contexts begin.
        """
        for part, rows in enumerate((np.arange(self.train), np.arange(self.train, len(self.words)))):
            random = generator(0, "examples of first letters", part)
            rows = random.permutation(rows)
            # At least two groups, so that each has other words to draw from.
            for words in np.array_split(rows, max(2, -(-len(rows) // GROUP))):
                others = np.setdiff1d(rows, words)
                examples = random.choice(others, min(EXAMPLES, len(others)), replace=False)
                lines = [token for row in examples for token in _line(self.words[row])]
                yield Group((*begin, *lines, *self.words[words[0]].before), words)


def _line(word: Word) -> tuple[int, ...]:
    return (*word.before, word.token, *word.after)


def first_letter_task(tokenizer: Tokenizer) -> Task:
    """Words for every letter, at most WORDS each, a fifth of them test words; the same for the same tokenizer."""
    by_letter: list[list[tuple[int, str]]] = [[] for _ in LETTERS]
    for token, text in enumerate(token_texts(tokenizer.backend)):
        letters = text.removeprefix(" ")
        if letters and all(letter in string.ascii_letters for letter in letters):
            by_letter[LETTERS.index(letters[0].lower())].append((token, text))
    drawn = []
    for letter, found in enumerate(by_letter):
        random = generator(0, "words of a letter", letter)
        drawn += [(letter, *found[number]) for number in random.permutation(len(found))[:WORDS]]
    lines = tokenizer.encode([LINE.format(word=text, letter=LETTERS[letter].upper()) for letter, _, text in drawn])
    words = []
    for (letter, token, _), line in zip(drawn, lines, strict=True):
        ids = line.tolist()
        if token in ids:
            place = ids.index(token)
            words.append(Word(token, letter, tuple(ids[:place]), tuple(ids[place + 1 : -1])))
    # A word that is one token by itself but merges with its neighbours in the line has another line around it.
    usual = {letter: Counter((word.before, word.after) for word in words if word.letter == letter).most_common(1)
             for letter in range(len(LETTERS))}
    before = Counter(word.before for word in words).most_common(1)
    kept = [word for word in words if (word.before, word.after) == usual[word.letter][0][0]
            and word.before == before[0][0]]
    train, test = [], []
    for letter in range(len(LETTERS)):
        of_letter = [word for word in kept if word.letter == letter]
        tested = round(TEST_SHARE * len(of_letter))
        test += of_letter[:tested]
        train += of_letter[tested:]
    return Task([*train, *test], len(train), len(drawn) - len(kept))


def rows_of_words(model: LoadedModel, task: Task, begin: tuple[int, ...]) -> dict[Site, Tensor]:
    """The model's rows at each word, for each of its sites `[N, D]`, float32, in the order of the words."""
    parts: list[dict[Site, Tensor]] = []
    order: list[int] = []
    with bar("first letters", len(task.words), "words") as advance:
        for group in task.groups(begin):
            parts.append(rows_after(model, group.prompt, [task.words[number].token for number in group.words]))
            order += group.words.tolist()
            advance(len(group.words))
    place_N = torch.from_numpy(np.argsort(order)).to(model.device)
    return {site: torch.cat([part[site] for part in parts])[place_N] for site in model.sites.places}
