"""Validation: whether a release, or one SAE folder, loads in the real SAELens and computes what it should.

Every check has a name, an SAE, a verdict and a figure. A check that cannot be made (no checkpoint beside the folder)
has no verdict and says why; it never counts as passed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.release.agreement import (
    ROWS,
    Agreement,
    chunks,
    compare,
    compare_silent,
    constant_rows,
    random_rows,
    reconstruct,
)
from olmoscope.release.finished_run import read_run
from olmoscope.release.layout import SAE_FILES, check_root
from olmoscope.release.manifest import MANIFEST, SAERead, read_manifest
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io import saelens
from olmoscope.sae.io.place import Here
from olmoscope.sae.io.saelens import KEYS, architecture_of, fixed, required
from olmoscope.sae.io.saelens_places import is_transcoder
from olmoscope.sae.io.saelens_settings import CONFIG, raw_settings
from olmoscope.sae.io.saelens_tensors import WEIGHTS, is_tied, raw_tensors, tensors_of
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.site import Site


@dataclass(frozen=True)
class Check:
    """One check: `passed` is None if it could not be made; then `figure` says why."""

    sae: str
    """The SAE's id; empty for the release as a whole."""
    name: str
    passed: bool | None
    figure: str


@dataclass(frozen=True)
class Validation:
    """All checks of a folder."""

    folder: Path
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]


def validate(folder: Path, *, runs: Path | None = None, rows: Mapping[Site, Tensor] | None = None) -> Validation:
    """Check a release, or a single SAE folder, with the real SAELens.

    Args:
        folder: a release (with manifest.json) or an SAE folder (with cfg.json).
        runs: the folder of the runs, by SAE id; None: `runs/` beside the release, or the run that contains a single SAE
            folder, if there is one.
        rows: real activations `[B, D]` of each site, any float dtype, the same tokens at all sites; None: random ones.

    Raises:
        UserError: neither a release nor an SAE folder; SAELens is not installed; rows have another width.
    """
    if (folder / MANIFEST).is_file():
        return _validate_release(folder, folder.parent / "runs" if runs is None else runs, rows or {})
    if (folder / CONFIG).is_file():
        single = _SAECheck(folder, folder.name, folder.parent, rows or {}, (CONFIG, WEIGHTS), None)
        return Validation(folder, single.run())
    hint = (f"did you mean {folder / 'release'}?" if (folder / "release").is_dir() else "give a release, an output "
            "folder with one (`olmoscope release OUT` makes it), or the folder `sae` of a run")
    raise UserError(f"{folder} is neither a release (no {MANIFEST}) nor an SAE folder (no {CONFIG}); {hint}")


def _validate_release(folder: Path, runs: Path, rows: Mapping[Site, Tensor]) -> Validation:
    manifest = read_manifest(folder)
    checks = [Check("", name, passed, figure) for name, passed, figure in check_root(folder, manifest)]
    for entry in manifest.saes:
        checks += _SAECheck(folder / entry.id, entry.id, runs / entry.id, rows, SAE_FILES, entry).run()
    return Validation(folder, checks)


class _SAECheck:
    """The checks of one SAE folder."""

    def __init__(self, folder: Path, sae_id: str, run: Path, rows: Mapping[Site, Tensor], files: tuple[str, ...],
                 entry: SAERead | None) -> None:
        self.folder, self.sae_id, self.files, self.entry, self.rows = folder, sae_id, files, entry, rows
        self.trained = read_run(run).load() if (run / "done.json").is_file() else None
        self.no_run = f"no finished run in {run}"
        self.checks: list[Check] = []

    def run(self) -> list[Check]:
        absent = [name for name in self.files if not (self.folder / name).is_file()]
        self._say("layout", not absent, f"absent: {', '.join(absent)}" if absent else f"{len(self.files)} files")
        load_from_disk = _saelens().load_from_disk
        try:
            config = raw_settings(self.folder)
            tensors = raw_tensors(self.folder)
            theirs = load_from_disk(self.folder, device="cpu")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            self._say("loads in SAELens", False, " ".join(str(error).split())[:200] or type(error).__name__)
            return self.checks
        self._say("loads in SAELens", True, f"{type(theirs).__name__}, {theirs.cfg.d_sae} latents")
        self._settings(config, theirs)
        self._metadata(config, theirs)
        self._tensors(tensors, config)
        try:
            ours = self.trained or saelens.read(Here(self.folder)).sae
        except UserError as error:
            self._say("same codes and reconstructions", False, str(error))
            return self.checks
        self._maths(ours, theirs, config)
        return self.checks

    def _settings(self, config: Mapping[str, Any], theirs: Any) -> None:
        """Check that cfg.json states every setting, that SAELens keeps it, and that it matches the trained SAE."""
        trained, entry = self.trained, self.entry
        architecture = str(config.get("architecture"))
        keys = KEYS.get(architecture, KEYS["topk"])
        transcoder = is_transcoder(architecture, config.get("metadata", {}))
        absent = [key for key in keys if key not in config]
        self._say("cfg.json says everything", not absent,
                  f"left to SAELens' defaults: {', '.join(absent)}" if absent else f"{len(keys)} keys")
        found = {**theirs.cfg.to_dict(), "k of the activation": getattr(theirs.activation_fn, "k", None)}
        wanted = {key: config[key] for key in keys if key in config and key not in ("metadata", "device")}
        if entry is not None:
            transcoder = entry.writes is not None
            wanted |= {"d_sae": entry.d_sae, "normalize_activations": entry.normalize}
            if not transcoder or entry.activation == "topk":
                wanted["architecture"] = "topk" if entry.activation == "topk" else "jumprelu"
        if trained is not None:
            transcoder = trained.transcoder
            wanted |= {"d_in": trained.d_in, "d_sae": trained.d_sae, "normalize_activations": trained.normalize,
                       "architecture": architecture_of(trained)}
            wanted |= {"d_out": trained.d_out} if "d_out" in keys else {}
        wanted |= fixed(transcoder)
        if wanted.get("architecture") == "topk":
            wanted |= {"rescale_acts_by_decoder_norm": False} | ({"k": entry.k} if entry else {})
            wanted |= {"k": trained.k} if isinstance(trained, TopK) else {}
            wanted["k of the activation"] = wanted.get("k")
        wrong = [f"{key} is {found.get(key)!r}, not {value!r}" for key, value in wanted.items()
                 if found.get(key) != value]
        self._say("settings survive", not wrong, "; ".join(wrong) or f"{theirs.cfg.architecture()}, "
                  f"{theirs.cfg.normalize_activations}, b_dec {'not ' if transcoder else ''}subtracted")

    def _metadata(self, config: Mapping[str, Any], theirs: Any) -> None:
        said, kept = config.get("metadata", {}), theirs.cfg.metadata.to_dict()
        transcoder = is_transcoder(str(config.get("architecture")), said)
        wrong = [f"{key} is absent" for key in required(transcoder) if key not in said]
        wrong += [f"{key} became {kept.get(key)!r}" for key in said if key not in kept or kept[key] != said[key]]
        self._say("metadata survives", not wrong, "; ".join(wrong) or f"{len(said)} entries")

    def _tensors(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        if str(config.get("metadata", {}).get("training_architecture")).startswith("tied_"):
            tied = is_tied(tensors)
            self._say("encoder is the decoder transposed", tied, "equal" if tied else "they differ")
        name = "tensors equal the checkpoint's"
        if self.trained is None:
            self._say(name, None, self.no_run)
            return
        wanted = tensors_of(self.trained)
        shapes = [f"{key} is {list(tensors[key].shape) if key in tensors else 'absent'}, not {list(wanted[key].shape)}"
                  for key in wanted if key not in tensors or wanted[key].shape != tensors[key].shape]
        if shapes:
            self._say(name, False, "; ".join(shapes))
            return
        worst = max(_difference(tensors[key], wanted[key]) for key in wanted)
        self._say(name, worst == 0, f"max abs difference {worst}")

    def _maths(self, ours: SparseCoder, theirs: Any, config: Mapping[str, Any]) -> None:
        if not isinstance(ours, TopK | JumpReLU) or not _comparable(ours, theirs.cfg):
            self._say("same codes and reconstructions", False, "SAELens' SAE does not have the same form")
            return
        kind, real_BD, target_BD = self._real_rows(ours, config)
        some_BD = real_BD[:ROWS]
        self._agree(f"same on {kind} rows", compare(ours, theirs, real_BD))
        self._agree("same on negative rows", compare(ours, theirs, -some_BD.abs()))
        silent = compare_silent(ours, theirs, some_BD)
        self._say("same where no pre-activation is positive", silent.good and silent.most_active == 0,
                  f"{silent}; {silent.most_active} latents active")
        self._agree("same on constant rows", compare(ours, theirs, constant_rows(ours.d_in)))
        self._agree("same on bfloat16 rows", compare(ours, theirs, some_BD.bfloat16()))
        with torch.no_grad():
            xhat_BD = torch.cat([reconstruct(theirs, part_BD)[1] for part_BD in chunks(some_BD, ours.d_sae)])
        bad = int((~torch.isfinite(xhat_BD)).any(dim=1).sum())
        figure = f"{bad} of {len(some_BD)} {kind} rows are not finite"
        if target_BD is not None:
            y_BD = target_BD[:ROWS]
            error = (xhat_BD - y_BD).square().sum(dim=1) / y_BD.square().sum(dim=1)
            figure += f"; NMSE {float(error.mean()):.4f}"
        self._say("finite reconstructions", bad == 0, figure)

    def _real_rows(self, ours: TopK | JumpReLU, config: Mapping[str, Any]) -> tuple[str, Tensor, Tensor | None]:
        """A name for the rows, the rows to read (float32), and the rows that a perfect SAE or transcoder would write,
        if they are known."""
        read_BD = self._rows_at("hook_name", ours.d_in, config)
        if not ours.transcoder:
            rows_BD = random_rows(ours) if read_BD is None else read_BD
            return "random" if read_BD is None else "real", rows_BD, rows_BD
        written_BD = self._rows_at("hook_name_out", ours.d_out, config)
        return ("random", random_rows(ours), None) if read_BD is None else ("real", read_BD, written_BD)

    def _rows_at(self, key: str, width: int, config: Mapping[str, Any]) -> Tensor | None:
        """The given rows of the site that the metadata names under a key, float32; None if there are none."""
        hook = str(config.get("metadata", {}).get(key, ""))
        x_BD = next((rows_BD for site, rows_BD in self.rows.items() if hook == site.transformer_lens), None)
        if x_BD is not None and (x_BD.dim() != 2 or x_BD.shape[1] != width or not len(x_BD)):
            raise UserError(f"{self.sae_id} has rows of width {width} at {hook}, but the rows given for it are "
                            f"{list(x_BD.shape)}: they come from another model")
        return None if x_BD is None else x_BD.float()

    def _agree(self, name: str, agreement: Agreement) -> None:
        self._say(name, agreement.good, str(agreement))

    def _say(self, name: str, passed: bool | None, figure: str) -> None:
        self.checks.append(Check(self.sae_id, name, passed, figure))


def _comparable(ours: TopK | JumpReLU, cfg: Any) -> bool:
    """Whether SAELens' SAE maps rows of the same width to codes of the same width, in the same way."""
    if (cfg.d_in, cfg.d_sae, getattr(cfg, "d_out", cfg.d_in)) != (ours.d_in, ours.d_sae, ours.d_out):
        return False
    return bool(cfg.architecture() == architecture_of(ours) and (not isinstance(ours, TopK) or cfg.k <= cfg.d_sae))


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max().nan_to_num(nan=torch.inf))


def _saelens() -> Any:
    """SAELens' `SAE`; slow to import, so only here."""
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise UserError("validation needs SAELens, which is not installed: pip install 'olmoscope[saelens]'") from error
    return SAE
