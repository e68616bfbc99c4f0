"""The rate of the last steps of `train.finish` on this machine (train/finish.py), with sequences of random tokens."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from olmoscope.cost.timing import time_steps
from olmoscope.files import write_json
from olmoscope.model.splice import load_causal_lm
from olmoscope.recipe.schema import Recipe
from olmoscope.seeds import generator
from olmoscope.site import Site
from olmoscope.tokens.batches import plan_batches
from olmoscope.tokens.segments import TokenSegment, write_token_segment
from olmoscope.train.derived import settled
from olmoscope.train.finish import ModelLoss, Piece, SequenceReader, draw_steps


def finish_seconds(recipe: Recipe, lengths: np.ndarray, device: torch.device, most: int) -> dict[Site, float]:
    """Time what the language model does in the steps of a finish: it reads sequences unchanged, then with
    reconstructions in place of a site's rows, and the gradient goes back to these rows.

    Args:
        lengths: the lengths of sequences like those of the store, `[S]`.
        most: the most steps that are timed at each site; one more runs first to warm up.

    Returns:
        Seconds per token for each site that a coder with a finish writes; empty if no coder has a finish. If several
        coders of a site are trained together, they share the unchanged pass, so they need less than this.

    Raises:
        UserError: the model cannot be loaded.
    """
    finishing = [(sae, train) for sae in recipe.saes if (train := settled(recipe, sae)).finish]
    if not finishing:
        return {}
    model = load_causal_lm(recipe.model, device)
    batches = {(sae.writes or sae.reads)[0]: train.batch for sae, train in finishing}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        _write_random_tokens(store, recipe, lengths, model.vocabulary)
        for site, batch in batches.items():
            reader = SequenceReader(lambda: model, [site], store, recipe.tokens.documents == "apart")
            loss = ModelLoss(reader, site, kl=1.0)

            def run(step: tuple[Piece, ...], site: Site = site, reader: SequenceReader = reader,
                    loss: ModelLoss = loss) -> int:
                read = reader.read(step)
                y_RD = read.rows[site].float()
                error_RD = 0.1 * torch.randn_like(y_RD) * y_RD.std()
                loss.pull(read, y_RD + error_RD, y_RD, error_RD).cpu()  # waits for the device
                return len(y_RD)

            found[site], _ = time_steps(f"measuring the finish at {site}", "steps",
                                        draw_steps(store, most + 1, batch, recipe.seed), run)
    return found


def _write_random_tokens(store: Path, recipe: Recipe, lengths: np.ndarray, vocabulary: int) -> None:
    """Write one token segment with sequences of these lengths, in planned batches."""
    batches = plan_batches(lengths, recipe.tokens.batch_tokens, recipe.tokens.max_padding)
    ordered = lengths[np.concatenate(batches)]
    rows, sequences = int(ordered.sum()), len(ordered)
    starts = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in (ordered, [len(batch) for batch in batches])]
    write_token_segment(store, 0, TokenSegment(
        token_ids=generator(recipe.seed, "tokens to measure").integers(vocabulary, size=rows).astype(np.int32),
        document_ids=np.zeros(rows, np.int64), sources=np.zeros(rows, np.uint8),
        sequence_numbers=np.arange(sequences), sequence_starts=starts[0], batch_starts=starts[1]), {}, {})
    write_json(store / "tokens" / "index.json", {"rows": [rows]})
