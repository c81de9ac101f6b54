"""Harvesting: a language model's activations, written to a cache in shards.

The folder holds, beside finished shards (see `kronsae.cache.index`):

harvest.json    the settings
progress/       the index and the position in the text, after each of the last two shards

Both stay, so that damaged shards and a lost index can be written again, and so that the harvest can
go on with more tokens.

index.json is written last; until then, the index in progress/ is that of the shards so far. An
interruption costs the shard that is being made. If the last shard of a complete cache had room for
more tokens, a harvest that goes on makes it again: its old rows are then the first of the new ones.

Several processes share a harvest in rounds: each packs all of the text, which is cheap, and makes
one of the next shards. The first writes the states and the index.
"""

import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from kronsae.cache.index import (
    DESCRIBED,
    HARVEST_NAME,
    INDEX_NAME,
    PROGRESS,
    SECTIONS,
    STORED,
    CacheIndex,
    Damaged,
    Hookpoint,
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
from kronsae.cache.model import tokenizer_digest
from kronsae.config import OF_MACHINE, DataConfig, check_values, from_dict, setting
from kronsae.data.activations import (
    LanguageModelActivations,
    describe_begin,
    resolve_context_length,
)
from kronsae.data.images import open_documents
from kronsae.data.many_hookpoints import ManyHookpoints
from kronsae.data.packing import marked, token_ids
from kronsae.data.text import check_text
from kronsae.errors import InputError, differences
from kronsae.system import checkpoint
from kronsae.system.documents import typed
from kronsae.system.files import (
    LOCK_NAME,
    lock,
    read_checksummed,
    remove_leftovers,
    sync,
    usable_path,
    write_checksummed,
)
from kronsae.system.parallel import ALONE, Mesh

FORMAT = "kronsae-harvest"
FORMAT_VERSION = 1

SECONDS_TO_APPEAR = 30.0
"""Time in which a file that one machine wrote is seen by the others."""

KEPT_STATES = 2
"""States kept in `progress/`: if the last one is damaged, one shard is made again."""


@dataclasses.dataclass(frozen=True)
class HarvestConfig:
    """Settings of a harvest. Raises InputError if they contradict each other."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Settings of model and text; all others have to keep their defaults."""
    layers: tuple[int, ...] = setting(
        (),
        "read the residual streams after these blocks, counted from 0: 3 6 9, 0-11 or all "
        "(embedded: 2)",
        parse="layers",
    )
    hookpoints: tuple[str, ...] = setting(
        (),
        "read these hookpoints: NAME, NAME:input, sites such as 6.attn_z, and all that match a "
        "pattern such as 'model.layers.*.mlp' or '*.attn_z'",
    )
    tokens: int = setting(
        0, "tokens to harvest for training, rounded up to whole forward passes (0: all the text)"
    )
    dtype: str = setting(
        "auto",
        "dtype of the stored activations (auto: the language model's; int8: with a scale for each "
        "token, half the size of bfloat16)",
        choices=("auto", *STORED),
    )
    shard_tokens: int = setting(32_768, "tokens per shard (at least one forward pass)", least=1)
    seed: int = setting(0, "seed of the order of documents")
    device: str = setting("auto", "cpu, cuda, cuda:1, ... (auto: cuda if there is one)")

    def __post_init__(self) -> None:
        check_values(self)
        for name, default in dataclasses.asdict(DataConfig()).items():
            value = getattr(self.data, name)
            if name not in (*DESCRIBED, *OF_MACHINE) and value != default:
                raise InputError(f"{name} {value!r} has no effect on a harvest: leave it out")

    def to_dict(self) -> dict[str, Any]:
        """Settings that determine the bytes of a cache, as JSON values."""
        values = dataclasses.asdict(self) | {"data": described(self.data)}
        del values["device"]
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "HarvestConfig":
        """The inverse of `to_dict`. Raises InputError for invalid values."""
        values = typed(values, dict, f"{where}: config")
        data = source_of_file(values.get("data"), f"{where}: config.data")
        return from_dict(cls, values | {"data": data}, where)


class Progress(NamedTuple):
    """How far a harvest is."""

    rows: int
    """Tokens with activations so far, held-out ones included."""
    planned: int | None
    """How many there will be, up to whole forward passes; None (all of the text): unknown."""
    repaired: str | None = None
    """The damaged shard that was just written again, such as "train shard 3"."""


def harvest(
    config: HarvestConfig,
    out: str | Path,
    on_progress: Callable[[Progress], None] | None = None,
    mesh: Mesh = ALONE,
) -> CacheIndex:
    """Write the activations that `config` names to a cache in the folder `out`; returns its index.

    Each forward pass reads all hookpoints. Tokens are those of live training: no special token, and
    none at the first position of a context. The held-out text is the same too.

    Called again, it resumes after the last finished shard, also with more `config.tokens` than
    before; the complete cache has the same bytes as one of an uninterrupted harvest (on the same
    hardware and versions). If the cache is complete, it is verified and damaged shards are written
    again.

    on_progress: called after each forward pass and each repaired shard (by the first process).
    mesh: the processes that share the harvest. They all call this, and see one folder.
    Raises InputError if model or text cannot be used, `out` holds anything else, activations are
    not finite or do not fit the dtype, or the disk is full.
    """
    folder, lock_file = usable_path(out, "--out"), None
    try:
        with mesh.world.together():
            if mesh.first:
                lock_file = _claim(folder, config)
        with mesh.world.together():
            _check_shared(folder)
        return _Harvest(folder, config, on_progress or (lambda _: None), mesh).run()
    finally:
        if lock_file is not None:
            lock_file.release()


def _claim(folder: Path, config: HarvestConfig) -> FileLock:
    """Make the folder ready for a harvest with these settings, and keep other harvests out."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be created: {error}") from error
    lock_file = lock(folder, f"{folder} is being harvested by another process")
    try:
        _prepare(folder, config)
        remove_leftovers(folder)
        remove_leftovers(folder / PROGRESS)
    except BaseException:
        lock_file.release()
        raise
    return lock_file


def _check_shared(folder: Path) -> None:
    """Raise InputError if this process does not see the folder of the first one."""
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not (folder / HARVEST_NAME).exists():
        if time.monotonic() > end:
            raise InputError(
                f"{folder} has no {HARVEST_NAME} here, which another process has written: several "
                "processes need a folder that all of them see"
            )
        time.sleep(0.1)


def stored_config(folder: Path) -> HarvestConfig:
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
            restore = shlex.join(["cp", str(copy), str(path)])
            problem = f"{path} is damaged ({error}); restore it from a copy:\n  {restore}"
        raise InputError(problem) from error
    return HarvestConfig.from_dict(values, str(path))


def goes_on(was: HarvestConfig, now: HarvestConfig) -> bool:
    """Whether `now` asks for more tokens than `was` (0: all of the text)."""
    return was.tokens > 0 and (now.tokens == 0 or now.tokens > was.tokens)


def _prepare(folder: Path, config: HarvestConfig) -> None:
    """Write the settings to an empty folder. Raises InputError if it holds anything else.

    A harvest may be there, with these settings or fewer tokens; an incomplete one also with more
    tokens than it is to have now, if it has not as many yet.
    """
    if (folder / HARVEST_NAME).exists() and not _is_empty(folder):
        was, so_far = stored_config(folder), _tokens_so_far(folder)
        shorter = so_far is not None and config.tokens >= max(1, so_far)
        may_change = shorter or goes_on(was, config)
        compared = {**was.to_dict(), "tokens": config.tokens} if may_change else was.to_dict()
        changes = differences(compared, config.to_dict())
        if changes:
            least = "more" if so_far is None else f"{so_far:,} or more, as there are so many"
            raise InputError(
                f"{folder} holds a harvest with other settings (only --tokens may change, to "
                f"{least}); choose another --out:\n  " + "\n  ".join(changes)
            )
        return
    if not _is_empty(folder):
        raise InputError(f"{folder} is not empty: choose another --out")
    write_checksummed(folder / HARVEST_NAME, _document(config))


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or a harvest that wrote its settings alone."""
    own_files = (LOCK_NAME, f".{HARVEST_NAME}", HARVEST_NAME)
    return all(path.name.startswith(own_files) for path in folder.iterdir())


def _tokens_so_far(folder: Path) -> int | None:
    """Tokens to train on that an incomplete harvest has; None for a complete one."""
    if (folder / INDEX_NAME).exists():
        return None
    try:
        return CacheIndex.open(folder).train_rows
    except InputError:  # there is no shard yet, or what is there is damaged
        return 0


def _document(config: HarvestConfig) -> dict[str, Any]:
    """The contents of harvest.json."""
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config.to_dict()}


class _Passes(NamedTuple):
    """The forward passes of a shard that is to be made."""

    contexts: list[Tensor]
    """Packed contexts [b, L] of each."""
    masks: list[Tensor]
    """Their tokens to store, [b, L]."""
    position: dict[str, Any]
    """The position in the text after them."""


class _Harvest:
    """A harvest in progress: the language model, the text, and the shards so far."""

    def __init__(
        self,
        folder: Path,
        config: HarvestConfig,
        on_progress: Callable[[Progress], None],
        mesh: Mesh,
    ) -> None:
        self.folder = folder
        self.config = config
        self.mesh, self.world = mesh, mesh.world
        self.on_progress = on_progress if mesh.first else lambda _: None
        self.progress = folder / PROGRESS
        self.shards: dict[str, list[Shard]] = {section: [] for section in SECTIONS}
        self.earlier = dict.fromkeys(SECTIONS, 0)
        """Shards of each section that were there when this harvest resumed."""

    def run(self) -> CacheIndex:
        path = self.folder / INDEX_NAME
        complete = path.exists() and not goes_on(stored_config(self.folder), self.config)
        if self.world.exchange(complete)[0]:
            return self._made_good()
        with self.world.together():
            self._open()
        try:
            with self.world.together():
                self._go_on()
            with self.world.together():
                if self.mesh.first:
                    self._settle()
            self._write_section("heldout", self._heldout())
            self._write_section("train", self._train())
            index = self._index()
            with self.world.together():
                # Whatever interrupted the harvest may have damaged earlier shards.
                self._repair(index, self._damaged(index, self.earlier))
        except InputError as error:
            if any(self.shards.values()):
                raise InputError(
                    f"{error}\nFinished shards are kept: resume by {resume_command(self.folder)}"
                ) from error
            raise
        with self.world.together():
            if self.mesh.first:
                write_checksummed(path, index.json())
                self._remove_begun(index)
        return index

    def _remove_begun(self, index: CacheIndex) -> None:
        """Remove files of a shard that an interrupted harvest with more tokens had begun."""
        files = {file.file for s in SECTIONS for shard in index.shards(s) for file in shard.files}
        for section in SECTIONS:
            for path in self.folder.glob(f"{section}-*.safetensors"):
                if path.name not in files:
                    path.unlink()

    def _made_good(self) -> CacheIndex:
        """The index of a complete cache, whose damaged shards are written again."""
        with self.world.together():
            index = CacheIndex.open(self.folder)
            broken = self._damaged(index)
            if broken:
                self._open()
                self._check_unchanged(index)
                self._repair(index, broken)
        return index

    def _damaged(
        self, index: CacheIndex, first: dict[str, int] | None = None
    ) -> list[tuple[str, int, str]]:
        """`damaged`, of this process's share of the shards."""
        return damaged(self.folder, index, first, (self.world.rank, self.world.size))

    def _open(self) -> None:
        from kronsae.system.devices import resolve_device

        config, device = self.config, resolve_device(self.config.device)
        check_text(config.data)
        data = dataclasses.replace(config.data, model_dtype=self._model_dtype())
        self.model = ManyHookpoints.load_at(data, config.layers, config.hookpoints, device)
        self.hookpoints = tuple(
            Hookpoint(
                *(point.hookpoint, point.d_model, point.layer), site=point.site_at(point.hookpoint)
            )
            for point in self.model.points
        )
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self.data = dataclasses.replace(
            config.data,
            context_length=resolve_context_length(self.model, config.data),
            model_dtype=self.dtype,
        )
        if config.dtype != "auto":
            self.dtype = config.dtype
        text = open_documents(self.data, config.seed)
        self.source = LanguageModelActivations(self.model, text, self.data, 1, config.seed)
        self.start = self.source.position_dict()
        self.head = self._without_shards()
        planned = config.tokens and config.tokens + int(self.source.heldout_mask().sum())
        self.planned = planned or None

    def _model_dtype(self) -> str:
        """The language model's dtype: as configured, or the one that "auto" meant so far."""
        if self.config.data.model_dtype == "auto":
            try:
                return CacheIndex.open(self.folder).data.model_dtype
            except InputError:  # there is no shard yet
                pass
        return self.config.data.model_dtype

    def _without_shards(self) -> CacheIndex:
        """The index before there are shards: what bytes depend on, besides the settings."""
        model = self.model.describe()
        names = ("name", "revision", "commit", "weights", "dtype")
        known = {name: model[name] for name in names} | self.model.changes
        return CacheIndex(
            hookpoints=self.hookpoints,
            dtype=self.dtype,
            context_length=self.data.context_length,
            data=self.data,
            model={**known, "parameters": self.model.parameters},
            tokenizer=tokenizer_digest(self.model.tokenizer),
            text=self.source.text.fingerprint(),
            seed=self.config.seed,
            heldout=(),
            train=(),
            begin=describe_begin(self.model.vocabulary, self.source.packer.begin),
        )

    def _index(self) -> CacheIndex:
        """The index of the shards so far."""
        heldout, train = (tuple(self.shards[section]) for section in SECTIONS)
        return dataclasses.replace(self.head, heldout=heldout, train=train)

    def _check_unchanged(self, was: CacheIndex) -> None:
        """Raise InputError if something that the bytes depend on is not what it was."""
        for name in ("model", "hookpoints", "tokenizer", "text", "dtype", "context_length"):
            expected, got = getattr(was, name), getattr(self.head, name)
            if got != expected:
                raise InputError(
                    f"{self.folder}: {name} has changed since the harvest began: expected "
                    f"{expected!r}, got {got!r}. Harvest into another folder"
                )

    # Going on

    def _go_on(self) -> None:
        """Resume after the last shard that stays as it is, if there is one."""
        known: CacheIndex | None = None
        for place in reversed(checkpoint.list_checkpoints(self.progress)):
            state = checkpoint.load_state(place)
            index = self._index_of(state, place)
            self._check_unchanged(index)
            known = known or index
            self.source.go_to(state["position"])
            if self._is_final(index):
                break
        else:  # there is no such state
            if known is None and (self.folder / INDEX_NAME).exists():
                known = CacheIndex.open(self.folder)
                self._check_unchanged(known)
            index = self._go_to_the_end_of(known) if known else self.head
        for section in SECTIONS:
            self.shards[section] = list(index.shards(section))
            self.earlier[section] = len(self.shards[section])

    def _index_of(self, state: dict[str, Any], place: Path) -> CacheIndex:
        """The index in a state of `progress/`."""
        if "index" in state:
            hint = f"remove the folder {place}, and {resume_command(self.folder)}"
            return CacheIndex.from_json(state["index"], place, hint, check=False)
        facts = state["facts"]  # of an earlier version
        heldout, train = (tuple(map(Shard.from_json, state["shards"][s])) for s in SECTIONS)
        return dataclasses.replace(
            self.head,
            model={name: facts["model"].get(name, x) for name, x in self.head.model.items()},
            tokenizer=facts["tokenizer"],
            text=facts["text"],
            dtype=facts["dtype"],
            heldout=heldout,
            train=train,
        )

    def _is_final(self, index: CacheIndex) -> bool:
        """Whether an index, after whose shards the source is, has no shard with room for more."""
        if not index.train or index.train[-1].rows >= self.config.shard_tokens:
            return True
        if 0 < self.config.tokens <= index.train_rows:
            return True
        position = self.source.position_dict()
        ended = self.source.next_contexts() is None
        self.source.go_to(position)
        return ended

    def _go_to_the_end_of(self, index: CacheIndex) -> CacheIndex:
        """The index without a last shard that has room for more; the source goes to its end."""
        self._pass_over(sum(shard.contexts for shard in index.train))
        if self._is_final(index):
            return index
        index = dataclasses.replace(index, train=index.train[:-1])
        self._pass_over(sum(shard.contexts for shard in index.train))
        return index

    def _pass_over(self, contexts: int) -> None:
        """Go to the place in the text after so many contexts to train on."""
        self.source.go_to(self.start)
        while contexts > 0 and (ids := self.source.next_contexts()) is not None:
            contexts -= len(ids)

    def _settle(self) -> None:
        """Let the settings hold, and the shards so far be all that there is.

        Until harvest.json has the settings, the shards are there without index.json, too.
        """
        document, written = _document(self.config), sum(map(len, self.shards.values()))
        states = checkpoint.list_checkpoints(self.progress)
        if written and checkpoint.step_folder(self.progress, written) not in states:
            self._save(self._index(), self.source.position_dict())
        for place in states:
            if _differs(place / HARVEST_NAME, document):
                state = checkpoint.load_state(place)
                checkpoint.save_state(place, state, copies={HARVEST_NAME: document})
        (self.folder / INDEX_NAME).unlink(missing_ok=True)
        sync(self.folder)
        if _differs(self.folder / HARVEST_NAME, document):
            write_checksummed(self.folder / HARVEST_NAME, document)
        checkpoint.drop_after(self.progress, written)
        checkpoint.prune(self.progress, KEPT_STATES)

    def _save(self, index: CacheIndex, position: dict[str, Any]) -> None:
        """Write the state after the shards of an index."""
        checkpoint.save_state(
            checkpoint.step_folder(self.progress, len(index.heldout) + len(index.train)),
            {"index": index.json(), "position": position},
            copies={HARVEST_NAME: _document(self.config)},
        )
        checkpoint.prune(self.progress, KEPT_STATES)

    # Shards

    def _heldout(self) -> Iterator[Tensor]:
        done = sum(shard.contexts for shard in self.shards["heldout"])
        left = self.source.packed_heldout()[done:]
        if len(left):
            yield from left.split(self.data.contexts_per_batch)

    def _train(self) -> Iterator[Tensor]:
        """Packed contexts [b, L] per forward pass, until there are as many tokens as configured."""
        rows = sum(shard.rows for shard in self.shards["train"])
        while not self.config.tokens or rows < self.config.tokens:
            ids = self.source.next_contexts()
            if ids is None:
                return
            rows += int(self.source.token_mask(ids).sum())
            yield ids

    def _write_section(self, section: str, passes: Iterator[Tensor]) -> None:
        shards, following = self.shards[section], self._shards_of(passes)
        rank = self.world.rank
        while True:
            own = None
            with self.world.together():
                round_ = list(islice(following, self.world.size))
                if rank < len(round_):
                    number = len(shards) + rank
                    own = self._write(section, number, round_[rank], at_once=len(round_))
            if not round_:
                return
            made = self.world.exchange(own and dataclasses.asdict(own))
            with self.world.together():
                for place, values in enumerate(made[: len(round_)]):
                    shards.append(Shard.from_json(values))
                    if self.mesh.first and place >= len(round_) - KEPT_STATES:
                        self._save(self._index(), round_[place].position)

    def _shards_of(self, passes: Iterator[Tensor]) -> Iterator[_Passes]:
        """The forward passes of each shard."""
        contexts, masks, rows = [], [], 0
        for packed in passes:
            contexts.append(packed)
            masks.append(self.source.token_mask(packed))
            rows += int(masks[-1].sum())
            if rows >= self.config.shard_tokens:
                yield _Passes(contexts, masks, self.source.position_dict())
                contexts, masks, rows = [], [], 0
        if rows:
            yield _Passes(contexts, masks, self.source.position_dict())

    def _write(self, section: str, number: int, made: _Passes, at_once: int) -> Shard:
        """Run the language model on the contexts of a shard, and write its files.

        at_once: number of shards that are made at the same time (0: to repair).
        """
        rows = int(sum(mask.sum() for mask in made.masks))
        stored = [self._new(rows, hookpoint.width) for hookpoint in self.hookpoints]
        done = sum(shard.rows for section in SECTIONS for shard in self.shards[section])
        start = 0
        for packed in made.contexts:
            parts = self.source.read(packed, "the text")
            stop = start + len(parts[0])
            for hookpoint, part, all_rows in zip(self.hookpoints, parts, stored, strict=True):
                _store(part, {name: y[start:stop] for name, y in all_rows.items()}, hookpoint)
            start = stop
            if at_once:
                self.on_progress(Progress(done + at_once * stop, self.planned))

        def write(name: str | int, tensors: dict[str, Tensor]) -> ShardFile:
            return write_tensors(self.folder / file_name(section, number, name), tensors)

        files = [write(number, tensors) for number, tensors in enumerate(stored)]
        ids, mask = token_ids(torch.cat(made.contexts)), torch.cat(made.masks)
        tokens = write("tokens", {"contexts": ids.int(), "mask": mask})
        return Shard(len(ids), rows, tokens, tuple(files))

    def _new(self, rows: int, width: int) -> dict[str, Tensor]:
        """Memory for the rows of a shard, as they are stored (`CacheIndex.activations_layout`)."""
        activations = torch.empty(rows, width, dtype=getattr(torch, self.dtype))
        scales = {"scales": torch.empty(rows)} if self.dtype == "int8" else {}
        return {**scales, "activations": activations}

    # Damaged shards

    def _repair(self, index: CacheIndex, broken: list[tuple[str, int, str]]) -> None:
        """Write the shards again that `damaged` has listed."""
        for section, number, _ in broken:
            packed = self._contexts_of(index, section, number).split(self.data.contexts_per_batch)
            passes = _Passes(list(packed), [*map(self.source.token_mask, packed)], {})
            if self._write(section, number, passes, at_once=0) != index.shards(section)[number]:
                raise InputError(
                    f"{self.folder}: shard {section} {number} was written again, but with other "
                    "bytes: on this hardware, or with these versions, the language model computes "
                    "other activations. Harvest into another folder"
                )
            rows = index.heldout_rows + index.train_rows
            self.on_progress(Progress(rows, rows, f"{section} shard {number:,}"))

    def _contexts_of(self, index: CacheIndex, section: str, number: int) -> Tensor:
        """Packed contexts [c, L] of a shard, from its file, or from the text if that is damaged."""
        shards = index.shards(section)
        shard, start = shards[number], sum(earlier.contexts for earlier in shards[:number])
        try:
            tokens = read_tensors(self.folder, shard.tokens, index.tokens_layout(shard))
            return marked(tokens["contexts"].long(), tokens["mask"])
        except Damaged:
            if section == "heldout":
                return self.source.packed_heldout()[start : start + shard.contexts]
        self._pass_over(start)
        parts, missing = [], shard.contexts
        while missing > 0 and (ids := self.source.next_contexts()) is not None:
            parts.append(ids)
            missing -= len(ids)
        return torch.cat(parts)


def _store(x: Tensor, into: dict[str, Tensor], hookpoint: Hookpoint) -> None:
    """Copy finite rows [r, width] float32 to where they are stored.

    Raises InputError if the dtype cannot hold them.
    """
    rows = into["activations"]
    if rows.dtype == torch.int8:  # the largest of each row becomes 127 or -127
        scales = x.abs().amax(1) / 127
        into["scales"].copy_(scales)
        x = (x / scales.where(scales > 0, 1)[:, None]).round_().clamp_(-127, 127)
    rows.copy_(x)
    if not torch.isfinite(rows).all():
        raise InputError(
            f"{hookpoint.name} has activations up to {x.abs().max():.4g}, which {rows.dtype} "
            "cannot hold: choose --dtype bfloat16 or float32, in another --out"
        )


def _differs(path: Path, document: dict[str, Any]) -> bool:
    """Whether a checksummed file holds something else, or cannot be read."""
    try:
        return read_checksummed(path) != document
    except (OSError, ValueError):
        return True
