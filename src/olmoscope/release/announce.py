"""Texts for what a person must do after an upload: a pull request to SAELens, and a message to Neuronpedia.

The texts are in `announce/`, beside the release and not in it, because they name the commit of the release.
"""

from pathlib import Path

from olmoscope.files import write_text
from olmoscope.release.manifest import ManifestRead, read_manifest
from olmoscope.release.push import Pushed
from olmoscope.release.registry import REGISTRY

FOLDER = "announce"


def write_announcements(release: Path, pushed: Pushed) -> list[Path]:
    """Write the texts for an uploaded release; return their paths."""
    manifest = read_manifest(release)
    texts = {"saelens-pull-request.md": _saelens(manifest, release, pushed),
             "neuronpedia.md": _neuronpedia(manifest, release.parent, pushed)}
    for name, text in texts.items():
        write_text(release.parent / FOLDER / name, text)
    return [release.parent / FOLDER / name for name in texts]


def _saelens(manifest: ManifestRead, release: Path, pushed: Pushed) -> str:
    """Source: SAELens 6.54.12, whose list of releases is `sae_lens/pretrained_saes.yaml`."""
    entry = (release / REGISTRY).read_text(encoding="utf-8")
    return f"""# A pull request to SAELens

With this pull request, `SAE.from_pretrained("{manifest.name}", "{manifest.saes[0].id}")` finds these SAEs by
name. Without it, they load by their repository: `SAE.from_pretrained("{pushed.repo}", "{manifest.saes[0].id}")`.

1. Fork <https://github.com/decoderesearch/SAELens>, and add the entry below to `sae_lens/pretrained_saes.yaml`.
2. Run SAELens' tests of the list of releases, and load one SAE by its new name.
3. Open a pull request with the title and the text below.

## Title

Add {manifest.name}: {len(manifest.saes)} SAEs for {manifest.model.name}

## Text

This adds {len(manifest.saes)} SAEs for `{manifest.model.name}` from <https://huggingface.co/{pushed.repo}> (tag
`{pushed.tag}`, commit `{pushed.commit}`), in SAELens format. The repository's card and `manifest.json` have the figures
on held-out text, the hashes of all files and the training settings. The entry's `l0` and `variance_explained` are from
held-out text.

## Entry

```yaml
{entry.rstrip()}
```
"""


def _neuronpedia(manifest: ManifestRead, out: Path, pushed: Pushed) -> str:
    """Source: hijohnnylin/neuronpedia, issue 46: a person at Neuronpedia imports the export."""
    saes = "\n".join(f"- `{sae.id}`: {sae.d_sae:,} latents" for sae in manifest.saes)
    return f"""# Steps to Neuronpedia

Neuronpedia shows what each latent fires on. Its team imports new sets of SAEs by hand, so the last step is a message.

1. Index the SAEs on text that you may publish: `olmoscope index {out}`. Neuronpedia publishes the example texts, so
   look at them first: `olmoscope browse {out}`.
2. Check that the language model, `{manifest.model.name}`, is on <https://neuronpedia.org>; if it is not, say so in the
   message.
3. Send the message below to the team, at <https://github.com/hijohnnylin/neuronpedia/issues> or by the address on the
   site.

## Message

We would like to add {len(manifest.saes)} SAEs for `{manifest.model.name}`:

{saes}

- Weights: <https://huggingface.co/{pushed.repo}>, tag `{pushed.tag}`, commit `{pushed.commit}`, SAELens format
- Name of the set: `{manifest.name}`
- Figures and training settings: in the repository's card and `manifest.json`
"""
