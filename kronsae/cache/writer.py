"""Harvesting: a language model's activations, written to a cache in shards.

The folder holds, beside finished shards (see `kronsae.cache.index`):

harvest.json    the settings
progress/       the list of shards and the position in the text, after each of the last two shards

Both stay, so that damaged shards and a lost index can be written again.

The index is written last. An interruption costs the shard that is being made.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.cache.index import (
    DESCRIBED,
    HARVEST_NAME,
    INDEX_NAME,
    PROGRESS,
    SECTIONS,
    CacheIndex,
    Damaged,
    Shard,
    ShardFile,
    damaged,
    described,
    file_name,
    read_tensors,
    resume_command,
    source_of_file,
    write_tensors,
)
from kronsae.cache.model import ManyHookpoints, tokenizer_digest
from kronsae.config import DTYPES, DataConfig, check_values, setting
from kronsae.data.activations import (
    LanguageModelActivations,
    describe_begin,
    resolve_context_length,
)
from kronsae.data.text import check_text, open_text
from kronsae.errors import InputError, differences
from kronsae.system import checkpoint
from kronsae.system.files import (
    LOCK_NAME,
    lock,
    read_checksummed,
    remove_leftovers,
    write_checksummed,
)

FORMAT = "kronsae-harvest"
FORMAT_VERSION = 1

KEPT_STATES = 2
"""States kept in `progress/`: if the last one is damaged, one shard is made again."""


@dataclasses.dataclass(frozen=True)
class HarvestConfig:
    """Settings of a harvest. Raises InputError if they contradict each other."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Settings of model and text; all others have to keep their defaults."""
    layers: tuple[int, ...] = setting(
        (), "read the residual streams after these blocks, counted from 0 (embedded: 2)"
    )
    hookpoints: tuple[str, ...] = setting((), "read the outputs of the modules of these names")
    tokens: int = setting(
        0, "tokens to harvest for training, rounded up to whole forward passes (0: all the text)"
    )
    dtype: str = setting(
        "auto",
        "dtype of the stored activations (auto: the language model's)",
        choices=("auto", *DTYPES),
    )
    shard_tokens: int = setting(32_768, "tokens per shard (at least one forward pass)", least=1)
    seed: int = setting(0, "seed of the order of documents")
    device: str = setting("auto", "cpu, cuda, cuda:1, ... (auto: cuda if there is one)")

    def __post_init__(self) -> None:
        for name, default in dataclasses.asdict(DataConfig()).items():
            value = getattr(self.data, name)
            if name not in (*DESCRIBED, "trust_remote_code") and value != default:
                raise InputError(f"{name} {value!r} has no effect on a harvest: leave it out")
        check_values(self)

    def to_dict(self) -> dict[str, Any]:
        """Settings that determine the bytes of a cache, as JSON values."""
        values = dataclasses.asdict(self) | {"data": described(self.data)}
        del values["device"]
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str, **others: Any) -> "HarvestConfig":
        """The inverse of `to_dict`; others: `device`. Raises InputError for invalid values."""
        try:
            values = dict(values)
            data = source_of_file(values.pop("data"), where)
            for name, kind in (("layers", int), ("hookpoints", str)):
                values[name] = tuple(values[name])
                if not all(type(value) is kind for value in values[name]):
                    raise TypeError(f"{name} {values[name]}")
            return cls(data=data, **values, **others)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where} was not written by a harvest ({error})") from error


class Progress(NamedTuple):
    """The shard that a harvest has just written."""

    section: str
    number: int
    """Number of the shard in its section."""
    rows: int
    """Rows of the section so far, or of the whole section if the shard was repaired."""
    repaired: bool = False
    """Whether it replaces a damaged shard."""


def harvest(
    config: HarvestConfig,
    out: str | Path,
    on_shard: Callable[[Progress], None] | None = None,
) -> CacheIndex:
    """Write the activations that `config` names to a cache in the folder `out`; returns its index.

    Each forward pass reads all hookpoints. Tokens are those of live training: no special token, and
    none at the first position of a context. The held-out text is the same too.

    Called again, it resumes after the last finished shard; the complete cache has the same bytes as
    one of an uninterrupted harvest (on the same hardware and versions). If the cache is complete,
    it is verified and damaged shards are written again.

    on_shard: called after each shard.
    Raises InputError if model or text cannot be used, `out` holds anything else, activations are
    not finite or do not fit the dtype, or the disk is full.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be created: {error}") from error
    lock_file = lock(folder, f"{folder} is being harvested by another process")
    try:
        _prepare(folder, config)
        remove_leftovers(folder)
        remove_leftovers(folder / PROGRESS)
        return _Harvest(folder, config, on_shard or (lambda _: None)).run()
    finally:
        lock_file.release()


def stored_config(folder: Path, **others: Any) -> HarvestConfig:
    """The settings of the harvest in `folder`. Raises InputError if there is none."""
    path = folder / HARVEST_NAME
    try:
        document = read_checksummed(path)
        if (document["format"], document["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"expected {FORMAT} of format version {FORMAT_VERSION}")
        values = document["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = (
            f"{folder} holds no harvest: {path} cannot be read ({error}); choose another --out"
        )
        copy = checkpoint.copy_of(path, folder / PROGRESS)
        if copy is not None:
            problem = f"{path} is damaged ({error}); restore it from a copy:\n  cp {copy} {path}"
        raise InputError(problem) from error
    return HarvestConfig.from_dict(values, str(path), **others)


def _prepare(folder: Path, config: HarvestConfig) -> None:
    """Write the settings to the folder. Raises InputError if it holds anything else."""
    if (folder / HARVEST_NAME).exists():
        changes = differences(stored_config(folder).to_dict(), config.to_dict())
        if changes:
            raise InputError(
                f"{folder} holds a harvest with other settings; choose another --out:\n  "
                + "\n  ".join(changes)
            )
        return
    own_files = (LOCK_NAME, f".{HARVEST_NAME}")
    if any(not path.name.startswith(own_files) for path in folder.iterdir()):
        raise InputError(f"{folder} is not empty: choose another --out")
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config.to_dict()}
    write_checksummed(folder / HARVEST_NAME, document)


class _Harvest:
    """A harvest in progress: the language model, the text, and the shards so far."""

    def __init__(
        self, folder: Path, config: HarvestConfig, on_shard: Callable[[Progress], None]
    ) -> None:
        self.folder = folder
        self.settings = read_checksummed(folder / HARVEST_NAME)
        self.config = config
        self.on_shard = on_shard
        self.progress = folder / PROGRESS
        self.shards: dict[str, list[Shard]] = {section: [] for section in SECTIONS}
        self.earlier = dict.fromkeys(SECTIONS, 0)
        """Shards of each section that were there when this harvest resumed."""

    def run(self) -> CacheIndex:
        if (self.folder / INDEX_NAME).exists():
            index = CacheIndex.open(self.folder)
            broken = damaged(self.folder, index)
            if broken:
                self._open()
                names = ("model", "hookpoints", "tokenizer", "text", "dtype", "context_length")
                was, now = ({n: getattr(i, n) for n in names} for i in (index, self._index()))
                self._check_unchanged(was, now)
                self._repair(index, broken)
            return index
        self._open()
        try:
            self._go_on()
            for section, passes in (("heldout", self._heldout()), ("train", self._train())):
                self._write_section(section, passes)
            index = self._index()
            # Whatever interrupted the harvest may have damaged earlier shards.
            self._repair(index, damaged(self.folder, index, self.earlier))
        except InputError as error:
            if any(self.shards.values()):
                raise InputError(
                    f"{error}\nFinished shards are kept: resume by {resume_command(self.folder)}"
                ) from error
            raise
        write_checksummed(self.folder / INDEX_NAME, index.json())
        return index

    def _open(self) -> None:
        from kronsae.system.devices import resolve_device

        config, device = self.config, resolve_device(self.config.device)
        check_text(config.data)
        self.model = ManyHookpoints.load_at(config.data, config.layers, config.hookpoints, device)
        self.widths = [hookpoint.width for hookpoint in self.model.hookpoints]
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self.data = dataclasses.replace(
            config.data,
            context_length=resolve_context_length(self.model, config.data),
            model_dtype=self.dtype,
        )
        if config.dtype != "auto":
            self.dtype = config.dtype
        text = open_text(self.data, config.seed)
        self.source = LanguageModelActivations(self.model, text, self.data, 1, config.seed)
        self.start = self.source.position_dict()

    def _facts(self) -> dict[str, Any]:
        """Everything that the bytes depend on, besides the settings."""
        return {
            "model": self.model.describe(),
            "tokenizer": tokenizer_digest(self.model.tokenizer),
            "text": self.source.text.fingerprint(),
            "dtype": self.dtype,
        }

    def _check_unchanged(self, was: dict[str, Any], now: dict[str, Any]) -> None:
        """Raise InputError if something that the bytes depend on is not what it was."""
        for name, expected in was.items():
            if now[name] != expected:
                raise InputError(
                    f"{self.folder}: {name} has changed since the harvest began: expected "
                    f"{expected!r}, got {now[name]!r}. Harvest into another folder"
                )

    def _go_on(self) -> None:
        """Resume from the state after the last finished shard, if there is one."""
        states = checkpoint.list_checkpoints(self.progress)
        if not states:
            return
        state = checkpoint.load_state(states[-1])
        self._check_unchanged(state["facts"], self._facts())
        for section in SECTIONS:
            self.shards[section] = [*map(Shard.from_json, state["shards"][section])]
            self.earlier[section] = len(self.shards[section])
        self.source.go_to(state["position"])

    def _heldout(self) -> Iterator[Tensor]:
        done = sum(shard.contexts for shard in self.shards["heldout"])
        left = self.source.heldout_contexts()[done:]
        if len(left):
            yield from left.split(self.data.contexts_per_batch)

    def _train(self) -> Iterator[Tensor]:
        """Token ids [b, L] per forward pass, until there are as many tokens as configured."""
        rows = sum(shard.rows for shard in self.shards["train"])
        while not self.config.tokens or rows < self.config.tokens:
            ids = self.source.next_contexts()
            if ids is None:
                return
            rows += int(self.source.token_mask(ids).sum())
            yield ids

    def _write_section(self, section: str, passes: Iterator[Tensor]) -> None:
        for parts in self._shards_of(passes):
            shards = self.shards[section]
            shards.append(self._write(section, len(shards), parts))
            state = {
                "facts": self._facts(),
                "shards": {s: [dataclasses.asdict(x) for x in self.shards[s]] for s in SECTIONS},
                "position": self.source.position_dict(),
            }
            written = sum(map(len, self.shards.values()))
            checkpoint.save_state(
                checkpoint.step_folder(self.progress, written),
                state,
                copies={HARVEST_NAME: self.settings},
            )
            checkpoint.prune(self.progress, KEPT_STATES)
            rows = sum(shard.rows for shard in shards)
            self.on_shard(Progress(section, len(shards) - 1, rows))

    def _shards_of(self, passes: Iterator[Tensor]) -> Iterator[list[list[Tensor]]]:
        """The forward passes of each shard."""
        parts, rows = [], 0
        for ids in passes:
            parts.append(self._forward(ids))
            rows += len(parts[-1][-1])
            if rows >= self.config.shard_tokens:
                yield parts
                parts, rows = [], 0
        if rows:
            yield parts

    def _forward(self, ids: Tensor) -> list[Tensor]:
        """A pass as it is stored: ids [b, L], mask [b, L], [r, width] of each hookpoint."""
        x = self.source.read(ids, "the text")
        dtype = getattr(torch, self.dtype)
        activations = []
        for hookpoint, part in zip(self.model.hookpoints, x.split(self.widths, 1), strict=True):
            stored = part.to("cpu", dtype, copy=True)
            if not torch.isfinite(stored).all():
                raise InputError(
                    f"{hookpoint.name} has activations up to {part.abs().max():.4g}, which {dtype} "
                    "cannot hold: choose --dtype bfloat16 or float32, in another --out"
                )
            activations.append(stored)
        return [ids, self.source.token_mask(ids), *activations]

    def _write(self, section: str, number: int, parts: list[list[Tensor]]) -> Shard:
        """Write the shard of these forward passes."""

        def write(name: str | int, tensors: dict[str, Tensor]) -> ShardFile:
            return write_tensors(self.folder / file_name(section, number, name), tensors)

        ids, mask, *activations = zip(*parts, strict=True)
        files = [write(i, {"activations": torch.cat(x)}) for i, x in enumerate(activations)]
        tokens = write("tokens", {"contexts": torch.cat(ids).int(), "mask": torch.cat(mask)})
        contexts, rows = sum(map(len, ids)), sum(map(len, activations[0]))
        return Shard(contexts, rows, tokens, tuple(files))

    def _index(self) -> CacheIndex:
        facts = self._facts()
        model = {n: facts["model"][n] for n in ("name", "revision", "commit", "weights", "dtype")}
        parameters = sum(p.numel() for p in self.model.model.parameters())
        return CacheIndex(
            hookpoints=self.model.hookpoints,
            dtype=self.dtype,
            context_length=self.data.context_length,
            data=self.data,
            model={**model, "parameters": parameters},
            tokenizer=facts["tokenizer"],
            text=facts["text"],
            seed=self.config.seed,
            heldout=tuple(self.shards["heldout"]),
            train=tuple(self.shards["train"]),
            begin=describe_begin(self.model.tokenizer, self.source.packer.begin),
        )

    # Damaged shards

    def _repair(self, index: CacheIndex, broken: list[tuple[str, int, str]]) -> None:
        """Write the shards again that `damaged` has listed."""
        for section, number, _ in broken:
            ids = self._contexts_of(index, section, number)
            parts = [self._forward(part) for part in ids.split(self.data.contexts_per_batch)]
            if self._write(section, number, parts) != index.shards(section)[number]:
                raise InputError(
                    f"{self.folder}: shard {section} {number} was written again, but with other "
                    "bytes: on this hardware, or with these versions, the language model computes "
                    "other activations. Harvest into another folder"
                )
            rows = sum(shard.rows for shard in index.shards(section))
            self.on_shard(Progress(section, number, rows, repaired=True))

    def _contexts_of(self, index: CacheIndex, section: str, number: int) -> Tensor:
        """Token ids [c, L] of a shard, from its file, or from the text if that is damaged."""
        shards = index.shards(section)
        shard, start = shards[number], sum(earlier.contexts for earlier in shards[:number])
        try:
            layout = index.tokens_layout(shard)
            return read_tensors(self.folder, shard.tokens, layout)["contexts"].long()
        except Damaged:
            if section == "heldout":
                return self.source.heldout_contexts()[start : start + shard.contexts]
        self.source.go_to(self.start)
        seen, parts = 0, []
        while seen < start + shard.contexts and (ids := self.source.next_contexts()) is not None:
            parts += [ids] if seen >= start else []
            seen += len(ids)
        return torch.cat(parts)
