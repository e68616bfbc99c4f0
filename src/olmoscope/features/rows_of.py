"""The input of `olmoscope index`: the SAE's model and the rows of a store or of a text; and where the index goes."""

from pathlib import Path

from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.store.place import is_elsewhere, store_folder, store_places
from olmoscope.activations.store.reader import open_store
from olmoscope.activations.store.shares import Worker
from olmoscope.distributed.launch import World
from olmoscope.errors import UserError
from olmoscope.features.build import Indexed, IndexedText, build_index
from olmoscope.features.format import Options
from olmoscope.model.config import read_config
from olmoscope.model.dtype import settle_model
from olmoscope.model.load import pick_device
from olmoscope.model_source import at_revision, pinned
from olmoscope.progress import console
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import Bos, Filter, Model, StoreRecipe, Text
from olmoscope.sae.io.context import chosen_bos, text_context
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.same_model import GivenModel, refuse_misfit, refuse_uncentred, said_by, take_for_same
from olmoscope.site import Site
from olmoscope.text.given import given_text
from olmoscope.tokens.tokenizer import load_tokenizer


def index_sae(where: str, *, store: Path | None = None, text: str | None = None, out: Path | None = None,
              model_name: str | None = None, site: Site | None = None, tokens: int = 1_000_000,
              bos: bool | None = None, filter_: Filter = Filter(), options: Options = Options(),  # noqa: B008 (frozen)
              device: str = "auto", world: World = World()) -> Indexed:  # noqa: B008 (frozen)
    """Index an SAE over a store, or over text that the model reads now.

    Args:
        where: an address, as for `open_sae`.
        store: by default the training store of the SAE's output folder or, if there is none (the SAE was trained live),
            the held-out store.
        text: a text, as for `given_sources`, to read instead of a store.
        out: by default `index` in the run's folder.
        model_name: the language model, if the SAE does not name it or uses another name than the store or the hub.
        site: the site, for an SAE that does not state it.
        tokens: most tokens of the text to read.
        bos: whether the text's sequences begin with BOS, for an SAE that does not say; None: the tokenizer decides.
        world: the processes that share the work, each of which must call this.

    Raises:
        UserError: see `open_sae`, `build_index`; there is no store or no text; both are given.
    """
    if store is not None and text is not None:
        raise UserError("--store and --text exclude each other: a store has its text already")
    if bos is not None and text is None:
        raise UserError("--bos and --no-bos need --text: the sequences of a store are fixed")
    with world.ranks.agreed():
        subject = open_sae(where, site)
        if subject.unread and filter_ == Filter():
            console.print(f"{subject.unread_note()} (--skip-first N and --skip-special leave rows out)", soft_wrap=True,
                          highlight=False, markup=False)
        out = out or _default_out(subject)
        model = _language_model(subject, model_name)
        if model is not None:
            refuse_uncentred(subject, model)
        if text is not None:
            if model is None:
                raise UserError(f"{where} does not name its language model; give --model")
            model = pinned(settle_model(model.model_copy(update={"dtype": "auto"}), pick_device(device)))
            rows = _of_text(subject, model, text, tokens, chosen_bos(subject, bos), device, world)
        else:
            store = store or _default_store(subject)
            rows = _of_store(store, subject)
            manifest = read_manifest(store)
            model = at_revision(model or Model(name=manifest.model.name), manifest.model.revision)
        found = pick_device(device, world.place.local_index)
    return build_index(subject, where, rows, model, out, filter_, options, found, world.ranks)


def _default_out(subject: Opened) -> Path:
    if subject.kind != "run":
        raise UserError(f"{subject.name} is not an Olmoscope run, so its index has no default folder; give --out")
    return subject.folder / ("index" if subject.step is None else f"index-step-{subject.step:08d}")


def _language_model(subject: Opened, name: str | None) -> Model | None:
    """The SAE's model, in a recipe's form; `name`, if given, must be another name of the same model."""
    said = said_by(subject)
    if name is not None and said is not None and (note := take_for_same(subject.name, said, GivenModel(name))):
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    if subject.kind == "run":
        model = load_recipe(str(subject.folder / "recipe.yaml")).model.model_copy(update={"compile": False})
    elif name or subject.model_name:
        model = Model(name=name or str(subject.model_name))
    else:
        return None
    if name in (None, model.name):
        return at_revision(model, subject.model_revision)
    return model.model_copy(update={"name": name, "revision": None})


def _default_store(subject: Opened) -> Path:
    for folder in subject.folder.resolve().parents:
        if is_elsewhere(folder):
            store_folder(folder, "train")  # raises an error if the store is gone
        for store in store_places(folder).values():
            if (store / "manifest.json").exists() and read_manifest(store).finished:
                console.print(f"Rows: {store}", highlight=False)
                return store
    raise UserError(f"there is no finished activation store near {subject.folder}; give --store, or --text so that the "
                    "model reads a text now")


def _of_store(path: Path, subject: Opened) -> IndexedText:
    manifest = read_manifest(path)
    if subject.bos != "auto" and (subject.bos == "yes") != bool(manifest.bos_token_ids):
        were, are = ("", "do not") if subject.bos == "yes" else ("not ", "do")
        console.print(f"note: {subject.name} was {were}trained on sequences that begin with BOS; those of {path} {are}",
                      soft_wrap=True, highlight=False)
    return IndexedText({"recipe_hash": manifest.recipe_hash, "split": manifest.split}, lambda _: open_store(path))


def _of_text(subject: Opened, model: Model, text: str, tokens: int, bos: Bos, device: str,
             world: World) -> IndexedText:
    """A text that the model reads into a temporary store, which is deleted when the index is finished."""
    if others := sorted({site.model for site in subject.reads if site.model}):
        raise UserError(f"{subject.name} reads other models too ({', '.join(others)}), but only one model reads "
                        "--text: index it over a store (--store)")
    refuse_misfit(subject, model, read_config(model))
    given = given_text(text, model)
    begin = load_tokenizer(model, bos).begin
    wanted = _collection(subject, model, given, tokens, "yes" if begin else "no", device)

    worker = Worker(**vars(world.place))

    return IndexedText({"recipe_hash": wanted.store_hash(), "split": "train", "text_hash": str(given.content)},
                       lambda work: open_store(work / "store"),
                       lambda work: collect(wanted, "train", work / "store", worker))


def _collection(subject: Opened, model: Model, text: Text, tokens: int, bos: Bos, device: str) -> StoreRecipe:
    """The recipe to collect the rows that the coder reads from this text, in sequences as long as those in its
    training."""
    if subject.kind == "run":
        trained = load_recipe(str(subject.folder / "recipe.yaml")).tokens
        sequences = {"chunk_lengths": trained.chunk_lengths, "documents": trained.documents,
                     "segment_rows": trained.segment_rows, "batch_tokens": trained.batch_tokens}
    else:
        length = text_context([subject], model)
        sequences = {"chunk_lengths": [(length, length)], "segment_rows": max(65536, length),
                     "batch_tokens": max(16384, length)}
    return StoreRecipe.model_validate({
        "device": device, "text": text, "tokens": {"count": tokens, "held_out": 1, "bos": bos, **sequences},
        "model": model, "activations": {"sites": sorted(subject.reads), "dtype": "float32"}})
