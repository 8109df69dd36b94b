"""The contract of a source of weights: named tensors, read whole or in part."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from types import TracebackType

import torch

from quire.errors import ModelError
from quire.formats.blocks import BlockTensor
from quire.formats.quantized import QuantTensor
from quire.weights.tensor_info import TensorInfo as TensorInfo

# Formats whose values stand alone, by the names used everywhere in Quire.
DENSE_DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8_e4m3": torch.float8_e4m3fn,
    "f8_e5m2": torch.float8_e5m2,
    "f8_e8m0": torch.float8_e8m0fnu,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u64": torch.uint64,
    "u32": torch.uint32,
    "u16": torch.uint16,
    "u8": torch.uint8,
    "bool": torch.bool,
}

SAMPLE_PIECES = 4
SAMPLE_PIECE_BYTES = 1024


class WeightSource(ABC):
    """Tensors under their Hugging Face names.

    Safe to read from several threads. Tensors that `read` returned stay valid after `close`;
    they may be views of a mapped file and must not be written to. `made`: values come from no file
    and cannot be wrong.
    """

    made = False

    @abstractmethod
    def names(self) -> list[str]:
        """All tensor names, sorted."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and format. ModelError if there is no such tensor."""

    @abstractmethod
    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor | BlockTensor | QuantTensor:
        """A tensor on the CPU (but see make_on), or only some of its first and last dimension.

        A BlockTensor where the format is packed: then columns are whole blocks. A QuantTensor
        where it is quantised: then slices are whole groups, or else a ModelError. ModelError if
        there is no such tensor; ValueError if a slice has a step or leaves the shape.
        """

    @abstractmethod
    def sample(self, name: str) -> bytes:
        """At most 4 KiB of the tensor's stored bytes, from places that only its size decides."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files. Reading afterwards raises ModelError."""

    def make_on(self, device: torch.device) -> None:  # noqa: B027
        """From now on what is computed, not read from files, is computed and read on `device`."""

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(self.info(name).nbytes for name in self.names())

    def fingerprint(self) -> str:
        """Hex blake2b-256 over names, shapes, formats, sizes and samples of all tensors."""
        digest = hashlib.blake2b(b"quire weights 1\n", digest_size=32)
        for name in self.names():
            info = self.info(name)
            sample = self.sample(name)
            head = f"{name!r} {info.shape} {info.format} {info.nbytes} {len(sample)}\n"
            digest.update(head.encode("utf-8", "surrogatepass"))
            digest.update(sample)
        return digest.hexdigest()

    def __enter__(self) -> WeightSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def missing_tensor(name: str, where: str) -> ModelError:
    return ModelError(
        code="missing_tensor",
        what=f"the weights have no tensor {name!r}",
        why=f"{where} does not hold it",
        fix="check that the files are complete and that config.json belongs to them",
    )


def source_closed(where: str) -> ModelError:
    return ModelError(code="weights_closed", what=f"the weights of {where} are already closed")


def bounds(part: slice | None, size: int) -> tuple[int, int]:
    """Start and stop of a slice of a dimension. ValueError for a step or a place outside it."""
    if part is None:
        return 0, size
    start = 0 if part.start is None else part.start
    stop = size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start <= stop <= size:
        raise ValueError(f"{part} is not a plain slice of a dimension of {size}")
    return start, stop


def sample_places(nbytes: int) -> list[tuple[int, int]]:
    """(start, stop) byte ranges of a sample: everything if small, else pieces spread evenly."""
    if nbytes <= SAMPLE_PIECES * SAMPLE_PIECE_BYTES:
        return [(0, nbytes)]
    last = nbytes - SAMPLE_PIECE_BYTES
    starts = [last * piece // (SAMPLE_PIECES - 1) for piece in range(SAMPLE_PIECES)]
    return [(start, start + SAMPLE_PIECE_BYTES) for start in starts]
