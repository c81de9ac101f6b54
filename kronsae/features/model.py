"""A language model with the SAEs that read it: from text to features, and back by steering.

sae = kronsae.load("runs/MY-RUN")
lm = kronsae.language_model(sae)
lm.features("import os").strongest()
with lm.steer({537: 60}):
    print(lm.generate("import os"))
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kronsae.config import DataConfig
from kronsae.data.images import check_no_images
from kronsae.data.language_model import LanguageModel, at_block, layer_or_hookpoint
from kronsae.data.loading import quiet
from kronsae.data.packing import PADDING, context_begin, left_out_ids, prompt_ids, token_mask
from kronsae.data.token_text import chip, continued_texts, token_texts
from kronsae.errors import InputError, first_line, warn
from kronsae.features.card import Card, card
from kronsae.features.text import Features
from kronsae.interventions.effects import factors, silence
from kronsae.interventions.hooks import Edit, ablate, clamp, intervene, steer
from kronsae.interventions.steering import Calibration, calibrated, check_numbers, generated
from kronsae.metrics.target_model import check_widths, data_of, known_data
from kronsae.model.massive import rule_of, without
from kronsae.model.sae import SAE
from kronsae.properties.correlation import joined
from kronsae.properties.labels import labels_beside
from kronsae.properties.run import digest_of, folder_of
from kronsae.properties.store import Stored, load_properties
from kronsae.system.devices import resolve_device, seed_everything
from kronsae.system.documents import Number, shown, typed
from kronsae_kernels import SparseCodes

if TYPE_CHECKING:
    import pandas as pd

Texts = str | Sequence[str] | Tensor


def language_model(
    *saes: SAE,
    model: Any = None,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> "TargetModel":
    """The language model that an SAE reads, or several SAEs of it at any of its hookpoints.

    model: another name or folder of it than the SAE's metadata have; or a model of transformers
        that is loaded, with its tokenizer.
    device: of the model (default: the first SAE's).
    settings: what the metadata do not say, or other values: the settings of the model in
        `kronsae.DataConfig`, such as layer, hookpoint, revision, model_dtype, load_in, device_map,
        bos and trust_remote_code.
    Raises InputError if the metadata name no model and none is given, if it cannot be loaded or
    has no such hookpoint, if widths do not fit, or if the SAEs read several models.
    """
    if not saes:
        raise InputError("expected at least one SAE, got none: kronsae.language_model(sae)")
    for sae in saes:
        if not isinstance(sae, SAE):
            raise InputError(
                f"expected an SAE, got {shown(sae)}: load it first, as "
                "kronsae.language_model(kronsae.load(FOLDER)), and name a model by model=NAME"
            )
    named = model is None or isinstance(model, str)
    if named and tokenizer is not None:
        raise InputError("tokenizer has no effect without a loaded model: give model=, too")
    if not named and not hasattr(model, "config"):
        raise InputError(f"model: expected a name or a model of transformers, got {shown(model)}")
    given = settings if model is None or not named else {"model": model, **settings}
    device = saes[0].device if device is None else resolve_device(str(device))
    places: list[Place] = []
    for number, sae in enumerate(saes):
        name = sae.source or ("the SAE" if len(saes) == 1 else f"SAE {number}")
        unknown = {} if named or known_data(sae) else {"model": "given"}
        data = data_of(sae, unknown | given, name)
        check_no_images(data, "kronsae.language_model")
        with quiet():
            if places:
                read = _another(places[0], data, name)
            else:
                read = LanguageModel.of(data, device) if named else _around(model, tokenizer, data)
        check_widths(read, sae, name)
        places.append(Place(sae, read, data))
    return TargetModel(places)


def _around(model: Any, tokenizer: Any, data: DataConfig) -> LanguageModel:
    """A loaded transformers model, read where `data` says."""
    if tokenizer is None:
        raise InputError("tokenizer: a model that is loaded needs it, to read texts")
    name = getattr(model.config, "_name_or_path", "") or data.model
    at = partial(LanguageModel, model, tokenizer, name=name, target_hookpoint=data.target_hookpoint)
    place = layer_or_hookpoint(data.model, data.layer, data.hookpoint)
    return at(place) if isinstance(place, str) else at_block(at, model, name, place)


def _another(first: "Place", data: DataConfig, name: str) -> LanguageModel:
    """The first SAE's model, read where another SAE reads it."""
    for setting in ("model", "revision", "bos"):
        one, other = getattr(first.data, setting), getattr(data, setting)
        if one != other:
            raise InputError(
                f"{name}: expected an SAE of the same {setting} as the first one's, {one!r}, got "
                f"{other!r}: call kronsae.language_model for each"
            )
    place = layer_or_hookpoint(data.model, data.layer, data.hookpoint)
    where: dict[str, Any] = {"hookpoint" if isinstance(place, str) else "layer": place}
    return first.model.at(**where, target_hookpoint=data.target_hookpoint)


class Place(NamedTuple):
    """An SAE, the language model read at its hookpoint, and the settings of its run."""

    sae: SAE
    model: LanguageModel
    data: DataConfig

    def mask(self, ids: Tensor) -> Tensor:
        """[b, t] bool: tokens of padded ids [b, t] that the SAE was trained on, or massive."""
        vocabulary = self.model.vocabulary
        begin = len(context_begin(vocabulary, self.data.bos))
        left_out = left_out_ids(vocabulary, self.data.exclude_tokens)
        return token_mask(ids, vocabulary, left_out, begin)


def _in_words(place: Place) -> str:
    where = place.model.hookpoint
    return f"{place.sae.source} at {where}" if place.sae.source else f"at {where}"


class TargetModel:
    """A language model and SAEs of it; `kronsae.language_model` makes it.

    model: the transformers model.  tokenizer: its tokenizer.  saes: as they were given.
    Methods take `sae`, which of them; it can be left out if there is one.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = list(places)
        self.saes = [place.sae for place in places]
        self.model, self.tokenizer = places[0].model.model, places[0].model.tokenizer
        self.bos = places[0].data.bos
        self._stored: dict[Path, Stored] = {}

    def __repr__(self) -> str:
        name, parameters = self.places[0].model.name, self.places[0].model.parameters
        lines = [f"{place.model.hookpoint}: {place.sae!r}" for place in self.places]
        return "\n".join([f"{name} ({parameters / 1e6:,.1f} M parameters), read at", *lines])

    def place(self, sae: SAE | None = None) -> Place:
        """The SAE and its hookpoint. Raises InputError if it is not one of `saes`."""
        if sae is None and len(self.places) == 1:
            return self.places[0]
        for place in self.places:
            if place.sae is sae:
                return place
        known = "; ".join(f"saes[{i}], {_in_words(place)}" for i, place in enumerate(self.places))
        raise InputError(
            f"sae: expected one of {len(self.saes)} of this language model, got "
            f"{'none' if sae is None else 'another'}: give sae= one of {known}"
        )

    # Reading

    def features(self, texts: Texts, sae: SAE | None = None) -> Features:
        """The features of each token of a text, or of several, by an SAE.

        texts: a text, a list of texts, or token ids [b, t] that begin as contexts do.
        Raises InputError for a text that is empty, or longer than the model reads.
        """
        return self.features_of_each(texts, [self.place(sae).sae])[0]

    @torch.no_grad()
    def features_of_each(self, texts: Texts, saes: Sequence[SAE] | None = None) -> list[Features]:
        """`features` by several SAEs (default: all), from one forward pass a batch of texts."""
        if isinstance(saes, SAE):
            raise InputError("saes: expected a list of SAEs, got one: features(texts, sae)")
        places = [self.place(sae) for sae in (self.saes if saes is None else saes)]
        names = list(dict.fromkeys(place.model.hookpoint for place in places))
        made: list[list[_Part]] = [[] for _ in places]
        ids = self._ids(texts)
        for batch in _batches(ids, places[0].data.contexts_per_batch):
            rows = dict(zip(names, places[0].model.activations_at(names, batch), strict=True))
            for parts, place in zip(made, places, strict=True):
                parts.append(_encoded(place, batch, rows[place.model.hookpoint]))
        if any(not part.kept.any() for parts in made for part in parts):
            warn(NOTHING_KEPT)
        tokens = [text for each in ids for text in token_texts(each, self.tokenizer)]
        number = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(each) for each in ids]))
        flat = torch.tensor([token for each in ids for token in each])
        return [
            Features(
                place.sae,
                tokens,
                flat,
                number,
                joined([part.codes for part in parts]),
                torch.cat([part.kept for part in parts]),
            )
            for place, parts in zip(places, made, strict=True)
        ]

    def _ids(self, texts: Texts) -> list[list[int]]:
        """Token ids of each text."""
        if isinstance(texts, Tensor):
            vocabulary = self.places[0].model.vocab_size
            if texts.ndim != 2 or texts.is_floating_point() or texts.dtype == torch.bool:
                raise InputError(
                    f"texts: expected token ids [b, t], got {list(texts.shape)} {texts.dtype}"
                )
            if texts.numel() and not 0 <= texts.min() <= texts.max() < vocabulary:
                raise InputError(
                    f"texts: expected token ids from 0 to {vocabulary - 1:,}, got "
                    f"{texts.min():,} to {texts.max():,}"
                )
            ids = texts.tolist()
        else:
            listed = [texts] if isinstance(texts, str) else texts
            if not isinstance(listed, Iterable):
                raise InputError(
                    "texts: expected a text, a list of texts, or token ids [b, t], got "
                    f"{type(texts).__name__}"
                )
            listed = list(listed)
            for number, text in enumerate(listed):
                if not isinstance(text, str):
                    raise InputError(f"texts: expected text, got {type(text).__name__}")
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise InputError(
                        f"text {number}: expected characters, got half of one (a lone surrogate, "
                        f"U+{ord(text[error.start]):04X}) at {error.start}"
                    ) from error
            ids = [prompt_ids(self.tokenizer, text, self.bos) for text in listed]
        longest = self.places[0].model.max_context
        for number, each in enumerate(ids):
            if not each:
                raise InputError(f"text {number} is empty: leave it out")
            if longest and len(each) > longest:
                raise InputError(
                    f"text {number} has {len(each):,} tokens, more than the {longest:,} that "
                    f"{self.places[0].model.name} reads: cut it, or give it in parts"
                )
        if not ids:
            raise InputError("texts: expected at least one, got none")
        return ids

    def _prompt(self, prompt: str) -> list[list[int]]:
        """Token ids of one text."""
        if not isinstance(prompt, str):
            raise InputError(f"prompt: expected one text, got {type(prompt).__name__}")
        return self._ids(prompt)

    @torch.no_grad()
    def next_tokens(self, prompt: str, count: int = 10) -> "pd.DataFrame":
        """The likeliest next tokens: token (a dot for a space), logit and probability.

        Raises InputError if logits are NaN, as they are with too large a strength.
        """
        import pandas as pd

        count = typed(count, Number(int, 1), "count")
        ids = torch.tensor(self._prompt(prompt))
        logits = check_numbers(self.places[0].model.logits(ids)[0, -1]).double().cpu()
        best = logits.topk(min(count, len(logits)))
        return pd.DataFrame(
            {
                "token": [
                    chip(continued_texts([token], self.tokenizer)[0])
                    for token in best.indices.tolist()
                ],
                "logit": best.values.numpy(),
                "probability": logits.softmax(-1)[best.indices].numpy(),
            }
        )

    def feature(
        self,
        latent: int,
        sae: SAE | None = None,
        *,
        properties: str | Path | None = None,
        label: str | None = None,
    ) -> Card:
        """A latent's card for a notebook: its figures, where it fires, and what it promotes.

        properties: the folder that `kronsae properties` or `kronsae explore` wrote (default:
            RUN/properties of the run that the SAE was loaded from, or the folder of this SAE in
            runs/explored).  label: what the latent is said to stand for
            (default: the one in labels.json beside the properties, from `kronsae explore`).
        Raises InputError if there is none, if it is of another SAE, or for a latent outside [0, F).
        """
        own = self.place(sae).sae
        digest, source = digest_of(own), own.source or "SAE"
        folder = Path(folder_of(source, digest) if properties is None else properties)
        if properties is None and not folder.is_dir():
            raise InputError(
                f"feature: {folder} is not there, so the properties of {source} are not measured "
                f"yet, or elsewhere: run `kronsae properties {source}`, or give properties=FOLDER, "
                "the folder named properties that it or `kronsae explore` has written"
            )
        if folder not in self._stored:
            self._stored[folder] = load_properties(folder)
        stored = self._stored[folder]
        if stored.facts.get("sae_sha256") != digest:
            raise InputError(
                f"{folder} has the properties of another SAE: measure this one's with "
                "`kronsae explore`"
            )
        own.check_latents([latent])
        if label is None and (said := labels_beside(folder.parent, own.dict_size, digest)):
            label = said[latent].text if latent in said else None
        return card(own, stored, latent, self.tokenizer, label)

    # Changing

    @torch.no_grad()
    def generate(
        self, prompt: str, max_new_tokens: int = 40, *, seed: int | None = None, **settings: Any
    ) -> str:
        """The text that the model writes after a prompt: by default the likeliest token each time.

        settings: of transformers' `generate`, such as do_sample=True, which draws with the seed
            (default: 0).
        Raises InputError for a seed where nothing is drawn, if the model does not read as many
        tokens as that would be, and if logits are NaN, as they are with too large a strength.
        """
        if seed is not None and not settings.get("do_sample"):
            raise InputError("seed has no effect without do_sample=True: give both, or neither")
        ids = torch.tensor(self._prompt(prompt))
        seed_everything(typed(seed or 0, Number(int), "seed"))
        with quiet():
            try:
                out = generated(self.places[0].model, ids, max_new_tokens, **settings)
            except InputError:
                raise
            except ValueError as error:  # of transformers, for settings
                raise InputError(f"generate: {first_line(error)}") from error
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def steer(
        self, strengths: Mapping[int, float], sae: SAE | None = None
    ) -> AbstractContextManager[None]:
        """While open, `strength` times its decoder row is added for each latent: z' = z + strength.

        As for `ablate` and `clamp`, the SAE's error is kept, and special tokens, the first position
        and massive tokens are not changed; see `kronsae.interventions.intervene`.
        Raises InputError for a latent outside [0, F).
        """
        return self.edit([steer(*pair) for pair in _pairs(strengths)], sae)

    def calibrated(
        self,
        latent: int,
        prompt: str,
        budget: float = 1.5,
        sae: SAE | None = None,
        *,
        usual: float = 1.0,
        **draw: Any,
    ) -> Calibration:
        """The largest strength to steer a latent by with which the model still writes fluently.

        budget: how many times the perplexity of unsteered text that of steered text may be.
        usual: the strength to begin with, such as the latent's largest activation.
        draw: new_tokens (40), samples (8) and seed (0) of the texts.
        The result has `strength`, and the texts `before` and `after`; see
        `kronsae.interventions.calibrated`, which also says what is raised.
        """
        place = self.place(sae)
        place.sae.check_latents([latent])
        return calibrated(
            place.model,
            self._prompt(prompt)[0],
            lambda strength: intervene(place.model, place.sae, [steer(latent, strength)]),
            budget,
            usual=usual,
            **draw,
        )

    def clamp(
        self, values: Mapping[int, float], sae: SAE | None = None
    ) -> AbstractContextManager[None]:
        """While open, each latent has its value on every token, also where it does not fire."""
        return self.edit([clamp(*pair) for pair in _pairs(values)], sae)

    def ablate(
        self, latents: Iterable[int] | int, sae: SAE | None = None
    ) -> AbstractContextManager[None]:
        """While open, the latents are 0."""
        listed = latents if isinstance(latents, Iterable) else [latents]
        return self.edit([ablate(latent) for latent in listed], sae)

    def silence(
        self, latent: int, factor: str = "composition", sae: SAE | None = None
    ) -> AbstractContextManager[None]:
        """While open, a latent of a KronSAE is silenced ("composition"), or all those of its "base"
        or of its "extension".

        With TopK, others are selected in their place, as `kronsae intervene --and-test` does.
        Raises InputError for a dense SAE, and for another factor.
        """
        place = self.place(sae)
        known = factors(place.sae, latent)
        if factor not in known:
            raise InputError(f"factor: expected {', '.join(known)}, got {shown(factor)}")
        return silence(place.model, place.sae, known[factor])

    def edit(self, edits: Sequence[Edit], sae: SAE | None = None) -> AbstractContextManager[None]:
        """While open, the edits apply in every forward pass."""
        place = self.place(sae)
        return intervene(place.model, place.sae, edits)


def _pairs(values: Mapping[int, float]) -> Iterable[tuple[int, float]]:
    if not isinstance(values, Mapping):
        raise InputError(f"expected {{latent: value}}, got {type(values).__name__}")
    return values.items()


NOTHING_KEPT = (
    "no feature is active: the SAE is not trained on special tokens, massive tokens, and the first "
    "position of a text, and there are no others"
)


class _Part(NamedTuple):
    """Codes of all tokens of a batch, and which of them the SAE was trained on."""

    codes: SparseCodes
    kept: Tensor


def _encoded(place: Place, ids: Tensor, rows: Tensor) -> _Part:
    """Codes of the hookpoint's activations [b, t, d] for padded ids [b, t]."""
    sae, mask = place.sae, place.mask(ids)
    x = rows[mask.to(rows.device)]
    if (rule := rule_of(sae.metadata)) is not None:
        massive = rule.of_input.excludes(x)
        x, mask = x[~massive], without(mask, massive)
    codes = sae.encode(x.to(sae.W_dec))
    there = ids != PADDING
    kept = mask[there]

    def of_all(part: Tensor) -> Tensor:
        out = part.new_zeros(len(kept), max(1, part.shape[1]))  # a slot, if no latent is active
        out[kept.to(part.device), : part.shape[1]] = part
        return out

    return _Part(SparseCodes(*map(of_all, codes)), kept)


def _batches(ids: Sequence[Sequence[int]], size: int) -> Iterable[Tensor]:
    """Texts in their order, `size` at a time, padded on the right: [b, t] each."""
    for first in range(0, len(ids), size):
        part = ids[first : first + size]
        length = max(map(len, part))
        yield torch.tensor([[*each, *[PADDING] * (length - len(each))] for each in part])
