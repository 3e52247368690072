"""One label for an image."""

import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfl.config import DataConfig
from dfl.tasks.base import Encoded, LabelLoss
from dfl.tasks.tables import Table, column

KEPT_BYTES = 1 << 30  # prepared images kept in memory; beyond that they are prepared anew each time


@dataclass(frozen=True)
class ImageClassification(LabelLoss):
    """One label for each image: paths relative to their file, or images inside a data set."""

    name = "image_classification"
    auto_class = "AutoModelForImageClassification"
    modality = "image"
    labelled = True

    @classmethod
    def build(cls, processor: Any) -> "ImageClassification":
        return cls()

    @staticmethod
    def check(table: Table, data: DataConfig) -> None:
        """ValueError for a column that is not there, and for the first line whose image is not."""
        try:
            import PIL.Image
        except ImportError:
            raise ValueError("model.task = 'image_classification' needs Pillow; pip install 'dfl[vision]'") from None
        for line, value in zip(table.lines, column(table, "image", data.image), strict=True):
            if isinstance(value, str) and not (table.folder / value).is_file():
                raise ValueError(f"data.image = {data.image!r}: line {line} of {table.where} names {value!r}, "
                                 f"which is not a file in {table.folder}")
            if not isinstance(value, (str, PIL.Image.Image, bytes, dict)):
                raise ValueError(f"data.image = {data.image!r}: line {line} of {table.where} holds "
                                 f"{type(value).__name__}, not the path of an image")

    @staticmethod
    def encode(table: Table, labels: np.ndarray, data: DataConfig, processor: Any) -> Encoded:
        """A feature per row: pixel_values (channels, height, width) float32 and labels, made when asked for."""
        features = ImageFeatures(column(table, "image", data.image), labels, table, processor)
        features[0]  # a processor that does not fit shows here, not in the first round
        return Encoded(features)

    def collate(self, features: Sequence[dict], pad_to_multiple: int | None = None) -> dict[str, torch.Tensor]:
        """pixel_values (B, channels, height, width), labels (B,)."""
        return {"pixel_values": torch.from_numpy(np.stack([f["pixel_values"] for f in features])),
                "labels": torch.tensor([f["labels"] for f in features])}


@dataclass
class ImageFeatures(Sequence):
    """Images prepared one at a time: a data set of a few thousand would not fit into memory as floats."""

    images: Sequence[Any]
    labels: np.ndarray
    table: Table
    processor: Any
    kept: "OrderedDict[int, np.ndarray]" = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[int(i)]
        pixels = self.kept.get(i)
        if pixels is None:
            self.kept[i] = pixels = self._prepare(i)
            while len(self.kept) * pixels.nbytes > KEPT_BYTES:
                self.kept.popitem(last=False)
        return {"pixel_values": pixels, "labels": int(self.labels[i])}

    def sources(self, most: int) -> Iterator[bytes]:
        """What the images are made from, for a digest: the size of each, and the bytes of all of them, or of a sample of `most`."""
        total = 0
        for image in self.images:
            size = (self.table.folder / image).stat().st_size if isinstance(image, str) else len(_bytes_of(image, self.table.folder))
            total += size
            yield f"{size};".encode()
        for image in self.images[::max(1, -(-total // most))]:
            yield _bytes_of(image, self.table.folder)

    def _prepare(self, i: int) -> np.ndarray:
        where = f"line {self.table.lines[i]} of {self.table.where}"
        try:
            image = open_image(self.images[i], self.table.folder)
        except Exception as error:  # decoders raise whatever they stumble over: SyntaxError, struct.error, ...
            raise ValueError(f"{where}: the image cannot be read: {' '.join(str(error).split())[:200]}") from None
        pixels = self.processor(image, return_tensors="np")["pixel_values"]
        return np.ascontiguousarray(pixels[0], dtype=np.float32)


def _bytes_of(value: Any, folder: Path) -> bytes:
    """An image as it is stored: its file, its encoded bytes, or the pixels of one that is open already."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") else value["path"]
    if isinstance(value, str):
        return (folder / value).read_bytes()
    return value if isinstance(value, bytes) else value.tobytes()


def open_image(value: Any, folder: Path) -> Any:
    """An RGB image from a path, from encoded bytes, or as a data set gives it."""
    import PIL.Image

    if isinstance(value, dict):  # Hugging Face keeps an undecoded image as {bytes, path}
        value = value["bytes"] if value.get("bytes") else value["path"]
    if isinstance(value, str):
        value = PIL.Image.open(folder / value)
    elif isinstance(value, bytes):
        value = PIL.Image.open(io.BytesIO(value))
    return value.convert("RGB")
