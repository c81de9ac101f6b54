"""Harvesting: a language model's activations, written to a cache in shards.

The folder holds, beside finished shards (see `kronsae.cache.index`):

harvest.json    what was asked for
progress/       of the last two shards: which there are, and where the text stood then

Both stay, so that damaged shards, and an index, can be made anew.

The index comes last. Whatever interrupts a harvest costs the shard that it was at.
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
    damaged,
    file_name,
    read_tensors,
    resume_command,
    write_tensors,
)
from kronsae.cache.model import ManyHookpoints, tokenizer_digest
from kronsae.config import DTYPES, DataConfig, from_dict, setting
from kronsae.data.activations import LanguageModelActivations, resolve_context_length
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

KEPT = 2
"""Shards of which the progress is kept: if the last one's is damaged, one shard is made again."""


@dataclasses.dataclass(frozen=True)
class HarvestConfig:
    """What to harvest. Raises InputError for settings that contradict each other."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Model and text; what does not concern them has to be left at its default."""
    layers: tuple[int, ...] = setting(
        (), "residual streams after these blocks, counted from 0 (embedded: 2)"
    )
    hookpoints: tuple[str, ...] = setting((), "names of modules: their outputs")
    tokens: int = setting(
        0, "harvest at least so many tokens to train on, in whole forward passes (0: all the text)"
    )
    dtype: str = setting(
        "auto",
        "dtype of the activations on the disk (auto: the language model's)",
        choices=("auto", *DTYPES),
    )
    shard_tokens: int = setting(32_768, "tokens a shard, or a forward pass if that has more")
    seed: int = setting(0, "seed of the order of the documents")
    device: str = setting("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")

    def __post_init__(self) -> None:
        for name, default in dataclasses.asdict(DataConfig()).items():
            value = getattr(self.data, name)
            if name not in (*DESCRIBED, "trust_remote_code") and value != default:
                raise InputError(f"{name} {value!r} has no effect on a harvest: leave it out")
        for name, least in (("tokens", 0), ("shard_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected >= {least}, got {getattr(self, name)}")
        if self.dtype not in ("auto", *DTYPES):
            raise InputError(f"dtype: one of {('auto', *DTYPES)}, not {self.dtype!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values of all that decides the bytes of a cache; code from a hub is not trusted."""
        values = dataclasses.asdict(self)
        data = {name: values["data"][name] for name in DESCRIBED}
        del values["device"]
        return json.loads(json.dumps({**values, "data": data}))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str, **others: Any) -> "HarvestConfig":
        """What `to_dict` gave; others: `device`. Raises InputError for anything else."""
        try:
            values = dict(values)
            data = values.pop("data")
            unknown = sorted(data.keys() - set(DESCRIBED))
            if unknown:
                raise InputError(f"{where}: unknown settings {unknown}")
            data = from_dict(DataConfig, data, where)
            places = {name: tuple(values.pop(name)) for name in ("layers", "hookpoints")}
            if not all(type(i) is int for i in places["layers"]):
                raise TypeError(f"layers {places['layers']}")
            if not all(type(name) is str for name in places["hookpoints"]):
                raise TypeError(f"hookpoints {places['hookpoints']}")
            return cls(data=data, **places, **values, **others)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where} is not one that a harvest wrote ({error})") from error


class Progress(NamedTuple):
    """Where a harvest stands, after a shard."""

    section: str
    number: int
    """Of the shard, in its section."""
    rows: int
    """Of the section, so far; of a shard that took the place of a damaged one, in all."""
    damaged: bool = False
    """Whether it took the place of a damaged one."""


def harvest(
    config: HarvestConfig,
    out: str | Path,
    on_shard: Callable[[Progress], None] | None = None,
) -> CacheIndex:
    """Write the activations that `config` names to a cache in the folder `out`; returns its index.

    One forward pass reads all hookpoints and ends after the last. Tokens are those that live
    training takes: no special token, and none at the first position of a context; the held-out
    text is the same, and lies apart.

    Called again, it goes on behind the last shard that was finished, and in the end the folder
    holds, byte for byte, what an uninterrupted harvest would have written (on the same hardware and
    versions). A cache that is complete is verified, and damaged shards are made anew.

    on_shard: called after each shard.
    Raises InputError if model or text cannot be used, `out` holds anything else, activations are
    not finite or do not fit the dtype, or the disk is full.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be created: {error}") from error
    held = lock(folder, f"{folder} is being harvested by another process")
    try:
        _prepare(folder, config)
        for place in (folder, folder / PROGRESS):
            remove_leftovers(place)
        return _Harvest(folder, config, on_shard or (lambda _: None)).run()
    finally:
        held.release()


def stored_config(folder: Path, **others: Any) -> HarvestConfig:
    """What a harvest into `folder` was asked for. Raises InputError if there was none."""
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
            problem = f"{path} is damaged ({error}); there is a copy:\n  cp {copy} {path}"
        if not folder.is_dir():
            problem = f"{folder} holds no harvest: it does not exist"
        raise InputError(problem) from error
    return HarvestConfig.from_dict(values, str(path), **others)


def _prepare(folder: Path, config: HarvestConfig) -> None:
    """Write what is asked for into the folder, or see that it holds the same harvest."""
    if (folder / HARVEST_NAME).exists():
        changes = differences(stored_config(folder).to_dict(), config.to_dict())
        if changes:
            raise InputError(
                f"{folder} holds a harvest with other settings; choose another --out:\n  "
                + "\n  ".join(changes)
            )
        return
    begun = (LOCK_NAME, f".{HARVEST_NAME}")
    if any(path for path in folder.iterdir() if not path.name.startswith(begun)):
        raise InputError(f"{folder} is not empty: choose another --out")
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config.to_dict()}
    write_checksummed(folder / HARVEST_NAME, document)


class _Harvest:
    """The language model, the text, and the shards so far."""

    def __init__(
        self, folder: Path, config: HarvestConfig, on_shard: Callable[[Progress], None]
    ) -> None:
        self.folder = folder
        self.asked = read_checksummed(folder / HARVEST_NAME)
        self.config = config
        self.on_shard = on_shard
        self.progress = folder / PROGRESS
        self.shards: dict[str, list[Shard]] = {section: [] for section in SECTIONS}
        self.earlier = dict.fromkeys(SECTIONS, 0)
        """How many of them were there when this harvest went on with another."""

    def run(self) -> CacheIndex:
        if (self.folder / INDEX_NAME).exists():
            index = CacheIndex.open(self.folder)
            broken = damaged(self.folder, index)
            if broken:
                self._open()
                self._check_source(index)
                self._repair(index, broken)
            return index
        self._open()
        try:
            self._go_on()
            for section, passes in (("heldout", self._heldout()), ("train", self._train())):
                self._write_section(section, passes)
            index = self._index()
            # What was interrupted may have been struck by more.
            self._repair(index, damaged(self.folder, index, self.earlier))
        except InputError as error:
            if any(self.shards.values()):
                raise InputError(
                    f"{error}\nWhat was harvested stays: {resume_command(self.folder)} goes on"
                ) from error
            raise
        write_checksummed(self.folder / INDEX_NAME, index.json())
        return index

    def _open(self) -> None:
        from kronsae.system.devices import resolve_device

        config, device = self.config, resolve_device(self.config.device)
        check_text(config.data)
        self.model = ManyHookpoints.load_at(config.data, config.layers, config.hookpoints, device)
        self.widths = [each.width for each in self.model.hookpoints]
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
        """What the bytes depend on beside the settings."""
        return {
            "model": self.model.describe(),
            "tokenizer": tokenizer_digest(self.model.tokenizer),
            "text": self.source.text.fingerprint(),
            "dtype": self.dtype,
        }

    def _go_on(self) -> None:
        """Take over what an earlier harvest has finished."""
        found = checkpoint.list_checkpoints(self.progress)
        if not found:
            return
        state = checkpoint.load_state(found[-1])
        facts = self._facts()
        changed = [name for name in facts if facts[name] != state["facts"][name]]
        if changed:
            raise InputError(
                f"{self.folder}: {' and '.join(changed)} changed since the harvest began: expected "
                f"{[state['facts'][n] for n in changed]}, got {[facts[n] for n in changed]}"
            )
        for section in SECTIONS:
            self.shards[section] = [Shard.from_json(each) for each in state["shards"][section]]
            self.earlier[section] = len(self.shards[section])
        self.source.go_to(state["position"])

    def _heldout(self) -> Iterator[Tensor]:
        done = sum(shard.contexts for shard in self.shards["heldout"])
        left = self.source.heldout_contexts()[done:]
        if len(left):
            yield from left.split(self.data.contexts_per_batch)

    def _train(self) -> Iterator[Tensor]:
        """Token ids [b, L] a pass, until there are as many tokens as asked for."""
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
                copies={HARVEST_NAME: self.asked},
            )
            checkpoint.prune(self.progress, KEPT)
            rows = sum(shard.rows for shard in shards)
            self.on_shard(Progress(section, len(shards) - 1, rows))

    def _shards_of(self, passes: Iterator[Tensor]) -> Iterator[list["_Pass"]]:
        """Forward passes, as many as a shard takes."""
        parts: list[_Pass] = []
        for ids in passes:
            parts.append(self._forward(ids))
            if sum(part.rows for part in parts) >= self.config.shard_tokens:
                yield parts
                parts = []
        if sum(part.rows for part in parts):
            yield parts

    def _forward(self, ids: Tensor) -> "_Pass":
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
        return _Pass(ids, self.source.token_mask(ids), activations)

    def _write(self, section: str, number: int, parts: list["_Pass"]) -> Shard:
        ids = torch.cat([part.ids for part in parts])
        tokens = {"contexts": ids.int(), "mask": torch.cat([part.mask for part in parts])}
        marks = [
            write_tensors(
                self.folder / file_name(section, number, place),
                {"activations": torch.cat([part.activations[place] for part in parts])},
            )
            for place in range(len(self.widths))
        ]
        mark = write_tensors(self.folder / file_name(section, number, "tokens"), tokens)
        return Shard(len(ids), sum(part.rows for part in parts), mark, tuple(marks))

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
        )

    # Damaged shards

    def _check_source(self, index: CacheIndex) -> None:
        now = self._index()
        for name in ("model", "hookpoints", "tokenizer", "text", "dtype", "context_length"):
            found, expected = getattr(now, name), getattr(index, name)
            if found != expected:
                raise InputError(
                    f"{self.folder}: damaged shards cannot be made anew, as {name} has changed: "
                    f"expected {expected!r}, got {found!r}. Harvest into another folder"
                )

    def _repair(self, index: CacheIndex, broken: list[tuple[str, int, str]]) -> None:
        """Make shards anew that `damaged` has found."""
        for section, number, _ in broken:
            self._make_anew(index, section, number)

    def _make_anew(self, index: CacheIndex, section: str, number: int) -> None:
        expected = getattr(index, section)[number]
        ids = self._contexts_of(index, section, number)
        parts = [self._forward(part) for part in ids.split(self.data.contexts_per_batch)]
        if self._write(section, number, parts) != expected:
            raise InputError(
                f"{self.folder}: shard {section} {number} was made anew, but not with the same "
                "bytes: on this hardware, or with these versions, the language model computes "
                "other ones. Harvest into another folder"
            )
        rows = sum(shard.rows for shard in getattr(index, section))
        self.on_shard(Progress(section, number, rows, damaged=True))

    def _contexts_of(self, index: CacheIndex, section: str, number: int) -> Tensor:
        """Token ids [c, L] of a shard: from its file if that is whole, else from the text."""
        shards = getattr(index, section)
        shard, start = shards[number], sum(each.contexts for each in shards[:number])
        try:
            layout = index.tokens_layout(shard)
            return read_tensors(self.folder, shard.tokens, layout)["contexts"].long()
        except Damaged:
            if section == "heldout":
                return self.source.heldout_contexts()[start : start + shard.contexts]
        self.source.go_to(self.start)
        seen, parts = 0, []
        while seen < start + shard.contexts:
            ids = self.source.next_contexts()
            parts += [ids] if seen >= start else []
            seen += len(ids)
        return torch.cat(parts)


class _Pass(NamedTuple):
    """What one forward pass gave."""

    ids: Tensor
    """[b, L]"""
    mask: Tensor
    """[b, L]"""
    activations: list[Tensor]
    """[r, width] for each hookpoint, as they are stored."""

    @property
    def rows(self) -> int:
        return self.activations[0].shape[0]
