"""What the page says about an SAE as a whole: its evaluation, its settings, where it came from."""

from typing import Any

import numpy as np

from olmoscope.browse.collection import Shown
from olmoscope.browse.documents import documents, hub_page


def summary_payload(shown: Shown) -> dict[str, Any]:
    """A line for the choice of SAEs."""
    info = shown.index.info
    return {"slug": shown.slug, "name": info.sae.name, "layer": info.sae.layer, "site": str(info.sae.site),
            "d_sae": info.sae.d_sae,
            "d_model": info.sae.d_model, "model": info.model.name, "rows": info.rows, "dead": info.dead,
            "sources": list(info.sources), "no_promoted": info.no_unembedding}


def about_payload(shown: Shown) -> dict[str, Any]:
    """Everything except the list of files; a histogram of densities: counts of live features by half decades; and which
    documents there are (`documents.py`)."""
    info = shown.index.info
    return {**summary_payload(shown), "density": _densities(shown), "labelled": len(shown.label_texts()),
            "documents": documents(shown), "hub": hub_page(shown),
            "info": info.model_dump(mode="json", exclude={"files", "parts", "position_rows"})}


def _densities(shown: Shown) -> dict[str, list[float]]:
    """A histogram: live features by half decades of density."""
    live = shown.densities[shown.densities > 0]
    if not len(live):
        return {"edges": [], "counts": []}
    first = np.floor(2 * np.log10(live.min())) / 2
    edges = 10 ** np.arange(first, 0.01, 0.5)
    counts, _ = np.histogram(live, np.append(edges[:-1], np.inf))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
