"""The language model behind the page: how features respond to a prompt's tokens, and how the model continues it when
steered.

T tokens of a prompt, K active latents of each.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from olmoscope.errors import UserError
from olmoscope.features.steer import Continuation, Edit
from olmoscope.model.capture import read_sites
from olmoscope.model.load import pick_device
from olmoscope.model.positions import most_positions
from olmoscope.model.sites import Place
from olmoscope.model.splice import CausalLM, load_causal_lm
from olmoscope.model_adapter import ADAPTER_WEIGHTS
from olmoscope.model_source import alone, base_of, is_local, pinned
from olmoscope.recipe.schema import Model
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.codes import SparseCodes
from olmoscope.site import Site, deepest
from olmoscope.tokens.tokenizer import Tokenizer, load_tokenizer

LONGEST_PROMPT = 2048
"""Tokens."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class _Loaded:
    model: CausalLM
    tokenizer: Tokenizer
    most_tokens: int


class LiveModel:
    """A whole causal LM, loaded when it is first needed. One thread uses it at a time."""

    def __init__(self, model: Model, may_download: bool) -> None:
        """
        Args:
            may_download: if False, a hub model must be in the cache: nobody expects a click to download gigabytes.
        """
        self.name, self._model, self._may_download = model.name, model, may_download
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    def load(self) -> None:
        """Load it now, to find out early whether that works.

        Raises:
            UserError: it cannot be loaded.
        """
        with self._lock:
            self._get()

    def _get(self) -> _Loaded:
        if self._loaded is None:
            if not self._may_download:
                _refuse_download(self._model)
            wanted = pinned(self._model)
            model = load_causal_lm(wanted, pick_device("auto"))
            most = most_positions(model.module.config) or LONGEST_PROMPT
            self._loaded = _Loaded(model, load_tokenizer(wanted, "no"), min(LONGEST_PROMPT, most))
        return self._loaded

    def tokens(self, text: str, room: int = 0, begin: Sequence[int] = ()) -> list[int]:
        """The token ids of a text, without the EOS that ends a document.

        Args:
            room: tokens that the model will write after it.
            begin: ids to put before it: BOS, if the sequences of the index have it.

        Raises:
            UserError: it is empty or too long, or the model cannot be loaded.
        """
        with self._lock:
            loaded = self._get()
        ids: list[int] = loaded.tokenizer.encode([text])[0][:-1].tolist()
        if not ids:
            raise UserError("the prompt is empty: write some text")
        ids = [*begin, *ids]
        if len(ids) + room > loaded.most_tokens:
            raise UserError(f"the prompt has {len(ids)} tokens{f' and {room} are to follow' if room else ''}, but the "
                            f"page takes at most {loaded.most_tokens}; shorten it")
        return ids

    def encode(self, sae: SparseCoder, site: Site, ids: list[int]) -> SparseCodes:
        """The features' activations on each token of a prompt.

        Raises:
            UserError: the SAE belongs to another model.
        """
        with self._lock, torch.no_grad():
            model = self._get().model
            places = self._places(sae, sae.reads or (site,))
            ids_1T = torch.tensor([ids], device=model.device)
            found = read_sites(model.body, places, ids_1T)
            rows_TD = torch.cat([found[place.site][0] for place in places], dim=1)
            return sae.encode(rows_TD)

    def continuation(self, sae: SparseCoder, site: Site, ids: list[int], edits: list[Edit], *,
                     temperature: float, seed: int) -> "Writer":
        """A continuation of a prompt.

        Raises:
            UserError: the SAE belongs to another model.
        """
        with self._lock:
            if sae.transcoder or len(sae.reads) > 1:
                raise UserError("steering changes the one site that the SAE reads and writes, so a transcoder or a "
                                "crosscoder cannot steer")
            place, = self._places(sae, (site,))
            model, tokenizer = self._get().model, self._get().tokenizer
        made = Continuation(model.module, place, ids, temperature=temperature, seed=seed,
                            sae=sae, edits=edits)
        return Writer(made, self._lock, tokenizer)

    def _places(self, sae: SparseCoder, sites: Sequence[Site]) -> list[Place]:
        """Where the sites that a coder reads are in the model.

        Raises:
            UserError: the coder belongs to another model.
        """
        model = self._get().model
        if deepest(sites) < len(model.layers):
            found = model.find(sites)
            if sum(found.widths[site] for site in sites) == sae.d_in:
                return [found.places[site] for site in sites]
        raise UserError(f"model {self.name!r} ({len(model.layers)} layers of width {model.d_model}) does not fit this "
                        f"SAE ({', '.join(map(str, sites))}, width {sae.d_in}); give the right model with --model")


class Writer:
    """A continuation that takes turns with other uses of the model, and turns its tokens into text."""

    def __init__(self, made: Continuation, lock: threading.Lock, tokenizer: Tokenizer) -> None:
        self._made, self._lock, self._tokenizer = made, lock, tokenizer
        self._ids: list[int] = []
        self._text = ""

    def step(self) -> tuple[str, bool]:
        """Write the next token.

        Returns:
            The new text (empty in the middle of a character), and whether the text ends with it.
        """
        with self._lock:
            token = self._made.step()
        ended = token == self._tokenizer.eos_id
        if not ended:
            self._ids.append(token)
        decoded: str = self._tokenizer.backend.decode(self._ids, skip_special_tokens=False)
        if decoded.endswith("\ufffd") and not ended:  # part of a character: wait for the rest of its bytes
            return "", False
        new, self._text = decoded[len(self._text):], decoded
        return new, ended


def _refuse_download(model: Model) -> None:
    from huggingface_hub import try_to_load_from_cache

    if (base := base_of(model)) is not None:
        _refuse_download(base)
    if is_local(model):
        return
    model, weights = alone(model), _WEIGHTS if base is None else (ADAPTER_WEIGHTS,)
    if not any(isinstance(try_to_load_from_cache(model.name, name, revision=model.revision), str) for name in weights):
        raise UserError(f"model {model.name!r} is not on this machine, and the page downloads nothing by itself: run "
                        f"`olmoscope browse DIR --model {model.name}` to download it, or give --model FOLDER")
