"""A segment's rows, put batch by batch into the places that they have in the store.

On the CPU, the rows go straight into the buffer that will be written. On a GPU, they are gathered in the GPU's memory.
The finished segment is copied to pinned memory on a second stream while the model computes the next segment's first
batch.

Shapes: R rows of the segment, B rows of a batch, D width of the site.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.activations.store import fp8
from olmoscope.recipe.schema import StoreDtype
from olmoscope.site import Site

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16,
                "float8_e4m3": torch.float8_e4m3fn}


class SiteRows:
    """Memory for a segment's rows at one site, and the sums that statistics need."""

    def __init__(self, rows: int, width: int, dtype: StoreDtype, device: torch.device, pinned: bool = False) -> None:
        """
        Args:
            rows: rows of the longest segment.
            pinned: use page-locked memory, to which a GPU copies asynchronously.
        """
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)

        self.stored = {"activations": empty(rows, width, dtype=TORCH_DTYPES[dtype])}
        """What is written: `activations [R, D]`, and `scale [R]` if rows are in 8 bits."""
        if dtype == "float8_e4m3":
            self.stored["scale"] = empty(rows, dtype=torch.float32)
        self.square_norm_R = empty(rows, dtype=torch.float32)
        self.sum_D = empty(width, dtype=torch.float64)
        self.largest_D = empty(width, dtype=torch.float32)
        """max |x| of each channel; NaN or inf if a row contains one."""
        self.error_1 = empty(1, dtype=torch.float64)
        """Σ‖stored − x‖²: the error of the store's dtype."""

    def start(self) -> None:
        """Begin a segment."""
        for total in (self.sum_D, self.largest_D, self.error_1):
            total.zero_()

    def add(self, places_B: Tensor, x_BD: Tensor) -> None:
        """Put a batch of rows into their places, and count them, without waiting for the device.

        Args:
            places_B: the place of each row in the segment, int64.
            x_BD: the model's rows.
        """
        self.count(places_B, x_BD)
        activations_RD = self.stored["activations"]
        if "scale" in self.stored:
            stored_BD, scale_B = fp8.quantize(x_BD)
            self.stored["scale"].index_copy_(0, places_B, scale_B)
            read_BD = fp8.dequantize(stored_BD, scale_B)
        else:
            stored_BD = read_BD = x_BD.to(activations_RD.dtype)
        if stored_BD.dtype != x_BD.dtype:
            self.error_1 += (read_BD.float() - x_BD.float()).square().sum(dim=1).sum(dtype=torch.float64)
        _words(activations_RD).index_copy_(0, places_B, _words(stored_BD))

    def count(self, places_B: Tensor, x_BD: Tensor) -> None:
        """The part of `add` that computes what statistics need."""
        x32_BD = x_BD.float()
        self.square_norm_R.index_copy_(0, places_B, x32_BD.square().sum(dim=1))
        self.sum_D += x_BD.sum(dim=0, dtype=torch.float64)
        torch.maximum(self.largest_D, x32_BD.abs().amax(dim=0), out=self.largest_D)

    def read(self, part: slice) -> Tensor:
        """A copy of some rows as readers of a store get them, `[part, D]`."""
        rows_RD = self.stored["activations"][part]
        return fp8.dequantize(rows_RD, self.stored["scale"][part]) if "scale" in self.stored else rows_RD.clone()

    def copy_to(self, other: "SiteRows", rows: int) -> None:
        """Start copying the first `rows` rows and the counts, on the current stream."""
        for name, tensor in self.stored.items():
            other.stored[name][:rows].copy_(tensor[:rows], non_blocking=True)
        other.square_norm_R[:rows].copy_(self.square_norm_R[:rows], non_blocking=True)
        for name in ("sum_D", "largest_D", "error_1"):
            getattr(other, name).copy_(getattr(self, name), non_blocking=True)


@dataclass
class Buffer:
    """A segment on the host: the rows of every site, ready to be written once `wait` has returned."""

    sites: dict[Site, SiteRows]
    copied: torch.cuda.Event | None = None
    """Recorded when the copy from the GPU is done; None if there is no copy."""

    def wait(self) -> None:
        """Wait until the rows are there."""
        if self.copied is not None:
            self.copied.synchronize()


class SegmentRows:
    """The rows of the current segment, at all sites."""

    def __init__(self, widths: Mapping[Site, int], rows: int, dtype: StoreDtype, device: torch.device) -> None:
        """
        Args:
            widths: D of each site.
            rows: rows of the longest segment.
            device: the model's device.
        """
        self._widths, self._rows, self._dtype, self._device = widths, rows, dtype, device
        self._cuda = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._on_device = self._make(device) if self._cuda else {}
        self._copied: torch.cuda.Event | None = None
        self._started: set[Site] = set()

    def buffer(self) -> Buffer:
        """A buffer for segments, in host memory."""
        return Buffer(self._make(torch.device("cpu"), pinned=self._cuda))

    def _make(self, device: torch.device, pinned: bool = False) -> dict[Site, SiteRows]:
        return {site: SiteRows(self._rows, width, self._dtype, device, pinned)
                for site, width in self._widths.items()}

    def start(self, buffer: Buffer) -> None:
        """Begin a segment that will end up in a buffer."""
        self._buffer = buffer
        self._started.clear()

    def add(self, site: Site, places_B: Tensor, x_BD: Tensor) -> None:
        """Put a batch of a site's rows into their places `places_B`."""
        rows = (self._on_device if self._cuda else self._buffer.sites)[site]
        if site not in self._started:
            if self._copied is not None:  # the previous segment may still be being copied
                torch.cuda.current_stream(self._device).wait_event(self._copied)
            rows.start()
            self._started.add(site)
        rows.add(places_B, x_BD)

    def hand_over(self, rows: int) -> None:
        """Start copying the complete segment of `rows` rows to the buffer."""
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copies):
                for site, site_rows in self._on_device.items():
                    site_rows.copy_to(self._buffer.sites[site], rows)
                self._copied = self._buffer.copied = self._copies.record_event()


def _words(rows_RD: Tensor) -> Tensor:
    """The same memory with the widest possible elements: rows move two to six times faster this way, and 8-bit floats
    cannot be moved otherwise."""
    width = rows_RD.shape[1] * rows_RD.element_size()
    for dtype in (torch.int64, torch.int32, torch.int16):
        if width % dtype.itemsize == 0:
            return rows_RD.view(dtype)
    return rows_RD.view(torch.uint8)
