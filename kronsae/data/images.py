"""Images that a vision model reads, and how their patches stand in for tokens.

A context is one image. Its token ids are all one number, that of the image's row in the dataset.
Its positions are those of the model: first the class token and registers, if it has them, then the
patches, row by row. Hence packing, caches, held-out contexts and masks are those of text.

`--dataset` names image files or a folder of them, Parquet or Arrow files with a column of images
(of `datasets`, or bytes), or a dataset of the Hugging Face hub.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kronsae.config import DataConfig
from kronsae.data.common import BadImage, digest, reason
from kronsae.data.hookpoints import first_tensor
from kronsae.data.loading import config_of, main_device, quiet, source_of_model
from kronsae.data.text import (
    IndexedText,
    TextSource,
    check_text,
    content_hash,
    kind_of_file,
    no_bars,
    open_hub,
    open_text,
    reading,
)
from kronsae.errors import InputError, require
from kronsae.system.threads import processors

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

IMAGES = "image"
"""The column of image files, which have no other."""

DEEP = ("I", "F")
"""Beginnings of the modes of PIL with more than 8 bits a channel, which it cannot make RGB."""

PROBE_ROWS = (-1, -2)
"""Rows of two made images, which differ in one patch."""


class Images:
    """The images of a dataset, as the model's own image processor gives them to it.

    shape: [3, H, W], what the processor makes of an image.  grid: rows and columns of its patches.
    """

    def __init__(self, data: DataConfig) -> None:
        self.processor, self.shape, self.grid = _load_processor(data)
        self.patches = math.prod(self.grid)
        self.rows = _open_rows(data)
        self.digest = digest(self.processor.to_json_string())
        self.positions = self.patches
        """Positions of the model for an image, once `measure` has run it."""

    def __len__(self) -> int:
        return len(self.rows)

    def measure(self, model: "PreTrainedModel", name: str) -> None:
        """Count the positions of the model. Raises InputError if they are not those of patches."""
        pixels = torch.zeros(1, *self.shape, device=main_device(model), dtype=model.dtype)
        try:
            with torch.no_grad():
                shape = list(first_tensor(model(pixel_values=pixels)).shape)
        except Exception as error:  # of the model's code
            raise InputError(
                f"model {name!r} does not run on images alone ({reason(error)})"
            ) from error
        if len(shape) != 3 or not 0 <= shape[1] - self.patches < self.patches:
            raise InputError(
                f"model {name!r}: expected a hidden state for each of the {self.patches} patches "
                f"of an image, got {shape}: choose a model that keeps its patches (ViT, CLIP, "
                "SigLIP, DINOv2)"
            )
        self.positions = shape[1]

    @property
    def others(self) -> int:
        """Positions before the patches: of the class token and of registers."""
        return self.positions - self.patches

    @property
    def probe(self) -> Tensor:
        """Contexts [2, positions] of two made images."""
        return torch.tensor(PROBE_ROWS)[:, None].expand(-1, self.positions)

    @property
    def changed(self) -> int:
        """The position of the patch in which these differ."""
        return self.others + self.patches // 2

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """[b, 3, H, W] float32 of images. Raises InputError, which names the row."""
        with ThreadPoolExecutor(math.ceil(processors())) as pool:
            return torch.stack(list(pool.map(self._pixels, rows)))

    def _pixels(self, row: int) -> Tensor:
        if row in PROBE_ROWS:
            return self._made(changed=row == PROBE_ROWS[1])
        where = self.rows.where(row)
        pixels = _processed(self.processor, self.rows.image(row), where)
        if pixels.shape != self.shape:
            raise InputError(
                f"{where}: the model's processor makes {list(pixels.shape)} of it, and "
                f"{list(self.shape)} of a square image: it has to give all images one size"
            )
        return pixels

    def _made(self, changed: bool) -> Tensor:
        pixels = torch.randn(self.shape, generator=torch.Generator().manual_seed(0))
        if changed:
            row, column = divmod(self.patches // 2, self.grid[1])
            high, wide = (n // count for n, count in zip(self.shape[1:], self.grid, strict=True))
            pixels[:, row * high :][:, :high, column * wide :][..., :wide] *= -1
        return pixels


class _Rows(Sequence[Any]):
    """Documents that are the numbers of images: [0], [1], …"""

    def __init__(self, count: int) -> None:
        self.images = count

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < self.images:
            raise IndexError(row)
        return [row]


class _Files:
    """Image files."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def where(self, row: int) -> str:
        return str(self.files[row])

    def image(self, row: int) -> "Image":
        return _decoded({"path": str(self.files[row]), "bytes": None}, self.where(row))

    def fingerprint(self) -> str:
        return digest(*((path.name, path.stat().st_size) for path in self.files))


class _Column:
    """The images of a column of a `datasets.Dataset`."""

    def __init__(self, dataset: Any, data: DataConfig, files: list[Path]) -> None:
        import datasets

        column, self.name = data.image_column, f"dataset {data.dataset!r}"
        _check_column(data, dataset.column_names)
        self.column, self.files = column, files
        feature = dataset.features[column]
        structure = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        as_bytes = getattr(feature, "dtype", None) in ("binary", "large_binary")
        if not (isinstance(feature, datasets.Image) or structure or as_bytes):
            raise InputError(
                f"{self.name}, column {column!r}: expected images (the type of `datasets`, or the "
                f"bytes of image files), got {feature}; the columns are {dataset.column_names}: "
                "name another with --image-column"
            )
        chosen = dataset.select_columns([column])
        self.dataset = chosen.cast_column(column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, row: int) -> str:
        return f"{self.name}, row {row + 1:,}, column {self.column!r}"

    def image(self, row: int) -> "Image":
        return _decoded(self.dataset[row][self.column], self.where(row))

    def fingerprint(self) -> str:
        if self.files:
            return digest(self.column, *map(content_hash, self.files))
        return self.dataset._fingerprint


def open_documents(data: DataConfig, seed: int) -> TextSource:
    """The text that `data` names, or, if it has images, their numbers as documents.

    Raises InputError as `open_text` does.
    """
    if data.image_column is None:
        return open_text(data, seed)
    rows = _open_rows(data)
    return IndexedText(
        _Rows(len(rows)),
        None,
        seed=seed,
        epochs=data.epochs,
        fingerprint=rows.fingerprint(),
        name=data.dataset,
        heldout_order=data.heldout_order,
    )


def count_patches(data: DataConfig) -> int | None:
    """How many patches there are to train on, over all epochs; None if it is not known."""
    import pyarrow.parquet

    files, kind = _files_of(data)
    if kind == "image":
        images = len(files)
    elif kind == "parquet":
        images = sum(pyarrow.parquet.read_metadata(path).num_rows for path in files)
    else:
        return None
    *_, grid = _load_processor(data)
    return data.epochs * max(0, images * math.prod(grid) - data.heldout_tokens)


def blank_pixels(data: DataConfig, count: int = 1) -> Tensor:
    """[count, 3, H, W] zeros on the meta device, as the model that `data` names is given images."""
    _, shape, _ = _load_processor(data)
    return torch.zeros(count, *shape, device="meta")


def check_no_images(data: DataConfig, command: str) -> None:
    """Raise InputError for an autoencoder of images, which the command cannot read."""
    if data.image_column is not None:
        raise InputError(
            f"{command} reads text, and this autoencoder was trained on images (--image-column "
            f"{data.image_column}): kronsae evaluate and export take it"
        )


def _files_of(data: DataConfig) -> tuple[list[Path], str | None]:
    """The files that `data` names, and their kind; None for a dataset of the hub.

    Raises InputError, without reading images, if they have no such column.
    """
    import pyarrow.parquet

    files = check_text(data)
    kind = kind_of_file(files[0]) if files else None
    if kind not in (None, "image", "parquet", "arrow"):
        raise InputError(
            f"dataset {data.dataset!r}: expected image files, Parquet or Arrow files, or a dataset "
            f"of the hub, got {kind} ({files[0].name}, ...)"
        )
    if kind == "image":
        _check_column(data, [IMAGES])
    if kind == "parquet":
        with reading(f"dataset {data.dataset!r}: its parquet files could not be read"):
            _check_column(data, pyarrow.parquet.read_schema(files[0]).names)
    return files, kind


def _check_column(data: DataConfig, columns: list[str]) -> None:
    if data.image_column not in columns:
        raise InputError(
            f"dataset {data.dataset!r} has no column {data.image_column!r}: it has {columns}; name "
            "one with --image-column"
        )


def _open_rows(data: DataConfig) -> _Files | _Column:
    import datasets

    files, kind = _files_of(data)
    if kind == "image":
        return _Files(files)
    if kind is None:
        return _Column(open_hub(data), data, [])
    with reading(f"dataset {data.dataset!r}: its {kind} files could not be read"), no_bars():
        builder = datasets.load_dataset_builder(kind, data_files=list(map(str, files)))
        builder.download_and_prepare()
        if not builder.info.splits["train"].num_examples:
            raise InputError(f"dataset {data.dataset!r} is empty: there are no rows in its files")
        return _Column(builder.as_dataset("train"), data, files)


def _decoded(value: Any, where: str) -> "Image":
    """An image in RGB. Raises BadImage, which names where it is."""
    import datasets

    if value is None:
        raise BadImage(f"{where}: there is no image: remove the row")
    try:
        image = datasets.Image().decode_example(value)
        image.load()
    except Exception as error:  # of many formats
        raise BadImage(
            f"{where}: the image cannot be read ({reason(error)}): correct or remove it"
        ) from error
    if image.mode.startswith(DEEP):
        raise BadImage(
            f"{where}: expected 8 bits a channel, got an image of mode {image.mode!r}: convert it"
        )
    return image.convert("RGB")


def _processed(processor: Any, image: "Image", where: str) -> Tensor:
    try:
        made = processor([image], return_tensors="pt", input_data_format="channels_last")
        return made["pixel_values"][0].float()
    except Exception as error:  # of transformers
        raise BadImage(f"{where}: the model's image processor fails ({reason(error)})") from error


def _load_processor(data: DataConfig) -> tuple[Any, tuple[int, ...], tuple[int, int]]:
    """The model's image processor, the shape [3, H, W] that it gives, and the grid of patches.

    It uses PIL, whatever else is installed. Raises InputError if there is none.
    """
    require("pillow", "--image-column")
    import transformers
    from PIL import Image
    from transformers import AutoImageProcessor

    size = config_of(data).patch_size
    recent = int(transformers.__version__.split(".")[0]) >= 5
    source = source_of_model(data.model)
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(
                source.name,
                revision=data.revision,
                trust_remote_code=data.trust_remote_code,
                **({"backend": "pil"} if recent else {"use_fast": False}),
            )
    except Exception as error:  # of dozens of kinds
        raise InputError(
            f"model {data.model!r} has no image processor: images cannot be read without one. Save "
            f"it beside the model, or name another model ({reason(error)})"
        ) from error
    shape = tuple(_processed(processor, Image.new("RGB", (64, 64)), data.model).shape)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return processor, shape, (shape[1] // height, shape[2] // width)
