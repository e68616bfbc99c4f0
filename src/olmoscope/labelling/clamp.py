"""Which output tokens a feature makes likelier and less likely when it is clamped to its largest activation.

The index's own language model runs over some held-out text twice, unchanged and with the feature clamped at every
position. The text is the same for all features of an index. Shapes: B texts, T positions, V tokens of the vocabulary.
"""

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.features.outgoing import sae_of
from olmoscope.features.records import Feature, Token
from olmoscope.features.steer import Edit, steering
from olmoscope.labelling.text_blocks import LONGEST, TextBlocks
from olmoscope.model.load import pick_device
from olmoscope.model.splice import load_causal_lm
from olmoscope.model_source import at_revision
from olmoscope.recipe.schema import Model
from olmoscope.seeds import generator

TEXTS = 8
"""The most blocks of held-out text."""
TOKENS = 10
"""The most tokens of each kind."""

FLOOR = 1e-4
"""A probability that is too small for its changes to matter."""


class Clamping:
    """The language model and the SAE of an index. One thread uses it at a time."""

    def __init__(self, blocks: TextBlocks, device: str = "auto") -> None:
        """Load both, and run the model over the text once.

        Raises:
            UserError: one of them cannot be loaded or is no longer that of the index; the SAE is a transcoder or a
                crosscoder; no held-out text is long enough.
        """
        index = blocks.index
        site, of = index.info.sae.site, index.info.model
        opened = sae_of(index)
        if opened.sae.transcoder or len(opened.sae.reads) > 1:
            raise UserError(f"--clamp: {index.path} belongs to a transcoder or crosscoder, which does not write where "
                            "it reads, so its features cannot be clamped; leave out --clamp")
        self._model = load_causal_lm(at_revision(Model(name=of.name), of.revision), pick_device(device), [site])
        if self._model.revision != of.revision:
            raise UserError(f"the weights of {of.name} have changed since {index.path} was made (revision "
                            f"{self._model.revision}, not {of.revision})")
        self._sae = opened.sae.to(self._model.device)
        self._place = self._model.find([site]).places[site]
        self._tokens = index.tokens
        held_out = blocks.of_part("score")
        held_out = held_out[blocks.ends_B[held_out] - blocks.starts_B[held_out] == LONGEST]
        if not len(held_out):
            raise UserError(f"--clamp: no document of {index.path} that labels are scored on has {LONGEST} tokens; "
                            "index a longer text, or leave out --clamp")
        random = generator(blocks.seed, "texts in which features are clamped")
        chosen = random.choice(held_out, min(TEXTS, len(held_out)), replace=False)
        begin = list(index.info.store.get("bos_token_ids", []))
        self._begin = len(begin)
        self._ids_BT = torch.tensor([[*begin, *blocks.ids_T[start:start + LONGEST].tolist()]
                                     for start in blocks.starts_B[chosen].tolist()], device=self._model.device)
        self._usual_V = self._likely([])

    def tokens(self, feature: Feature) -> tuple[tuple[Token, ...], tuple[Token, ...]]:
        """The tokens whose mean probability rises most and falls most when a feature is clamped, by the logarithm of
        probability + `FLOOR`. (By differences, most features would have the most frequent tokens.)
        """
        clamped_V = self._likely([Edit(feature.index, "clamp", feature.max)])
        change_V = ((clamped_V + FLOOR) / (self._usual_V + FLOOR)).log()[:len(self._tokens)]
        order = change_V.argsort(descending=True, stable=True).tolist()
        return (tuple(self._tokens.token(one) for one in order[:TOKENS] if change_V[one] > 0),
                tuple(self._tokens.token(one) for one in order[:-TOKENS - 1:-1] if change_V[one] < 0))

    @torch.no_grad()
    def _likely(self, edits: list[Edit]) -> Tensor:
        """The probability of each next token, `[V]` float64 on the CPU: the mean over all positions of the texts."""
        with steering(self._place, self._sae, edits):
            hidden_BTD = self._model.read(self._ids_BT, None, []).hidden_BTD
        return torch.stack([self._model.logits(hidden_TD[self._begin:]).double().softmax(1).mean(0)
                            for hidden_TD in hidden_BTD]).mean(0).cpu()
