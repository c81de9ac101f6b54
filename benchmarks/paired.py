"""Two kinds of SAE, pair by pair, on tokens that neither saw: `python -m benchmarks.paired`.

    python -m benchmarks.paired --cache cache A-0 A-1 A-2 --beside B-0 B-1 B-2

The tokens are those of the cache after all that the SAEs can have read in training: if settings
were chosen on the held-out text, none was chosen on these. Documents are resampled to tell how far
a difference depends on the text. (Not contexts: a long document of an unusual kind fills many, one
after the other.) The interval of a mean is that of these SAEs on other text, not of other seeds.
"""

import argparse
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kronsae import SAE, load
from kronsae.cache.reader import CacheActivations
from kronsae.config import DataConfig
from kronsae.data.activations import MASK_SETTINGS
from kronsae.errors import InputError
from kronsae.model.massive import rule_of
from kronsae.system.documents import part_of
from kronsae.system.tables import markdown

RESAMPLED = 10_000
LEAST_DOCUMENTS = 30
"""Fewer say nothing about other text, and get no interval."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.paired", description=str(__doc__).splitlines()[0])
    given = parser.add_argument
    given("saes", nargs="+", help="SAEs that were trained on the cache")
    given("--beside", nargs="+", required=True, help="as many SAEs to compare them with")
    given("--cache", required=True, help="folder that kronsae harvest wrote")
    return parser


def opened(folder: str, saes: dict[str, SAE]) -> CacheActivations:
    """The cache at the hookpoint of all SAEs, which maps names to SAEs.

    Raises InputError unless each is an autoencoder that was trained, from random weights, from the
    cache in the order of the stream, all of them at one hookpoint; and if the cache leaves out
    tokens that end no document.
    """
    hookpoints = {}
    for name, sae in saes.items():
        data = sae.metadata.get("data") or {}
        if data.get("source") != "cache" or data.get("order") != "stream":
            raise InputError(
                f"{name}: expected an SAE trained from a cache with --activations-order stream, "
                "which leaves the end of the cache unread"
            )
        if sae.config.d_target:
            raise InputError(f"{name}: expected an autoencoder, got a transcoder")
        if "finetune" in sae.metadata:
            raise InputError(
                f"{name}: it went on from another SAE (--finetune), which may have read any token"
            )
        (hookpoints[name],) = data["hookpoints"]
    (first, hookpoint), *others = hookpoints.items()
    for name, other in others:
        if other != hookpoint:
            raise InputError(
                f"expected SAEs of one hookpoint: {name} was trained at {other}, and {first} at "
                f"{hookpoint}"
            )
    cache = CacheActivations(folder, hookpoint=hookpoint, batch_size=1)
    for setting in MASK_SETTINGS:
        got, usual = getattr(cache.index.data, setting), getattr(DataConfig(), setting)
        if got != usual:
            raise InputError(
                f"{folder} was harvested with {setting} {got!r}, so that a token that is left out "
                f"need not end a document: expected {usual!r}"
            )
    for name, sae in saes.items():
        given = cache.index.first(tokens_given(sae, cache), cache.folder)
        if sae.metadata["data"]["cache"] != given.fingerprint:
            raise InputError(f"{name} was trained from another cache than that in {folder}")
    return cache


def tokens_given(sae: SAE, cache: CacheActivations) -> int:
    """Tokens that its cache had when an SAE was trained, or --activations-tokens."""
    given = part_of(sae.metadata, "config", "data").get("activations_tokens")
    return min(given or cache.index.train_rows, cache.index.train_rows)


def tokens_read(sae: SAE, cache: CacheActivations) -> int:
    """Tokens at the start of its cache that an SAE can have been trained on."""
    data = sae.metadata["data"]
    read = sae.metadata["tokens"] + max(data["buffer_tokens"], 2 * data["batch_size"])
    return min(read, tokens_given(sae, cache))


def unseen(cache: CacheActivations, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations [r, d], and the document of each [r], of the shards from token `first` on.

    Each special token ends a document, but for those that begin each context. The mask leaves out
    special tokens, and what is first in a context, which can be text.
    """
    tokens = documents = 0
    begin = len(cache.index.begin.get("context_begin") or ())
    for number, (ids, mask, rows) in enumerate(cache.text_in_order()):
        if number < len(cache.index.heldout):
            continue
        if tokens >= first:
            first_of_text = max(1, begin)
            special = ids[:, first_of_text:][~mask[:, first_of_text:]]
            ends = torch.isin(ids, special)
            ends[:, :begin] = False
            document = documents + ends.flatten().cumsum(0).view_as(mask)
            documents = int(document[-1, -1])
            yield rows, document[mask]
        tokens += len(rows)


@torch.no_grad()
def errors(saes: Sequence[SAE], x: Tensor, document: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distance [n] from the mean and squared error [s, n], by document, and L0 [s]."""

    def by_document(squares: Tensor) -> Tensor:
        sums = torch.zeros(int(document.max()) + 1, dtype=torch.float64)
        return sums.index_add_(0, document, squares.double())

    wrong, l0 = [], []
    for sae in saes:
        squares, active = [], 0
        for part in x.split(2048):
            out = sae(part)
            squares.append((out.x_hat - part).square().sum(1))
            active += int((out.codes.values > 0).sum())
        wrong.append(by_document(torch.cat(squares)))
        l0.append(active / len(x))
    return by_document((x - x.mean(0)).square().sum(1)), torch.stack(wrong), torch.tensor(l0)


def interval(gains: Tensor, from_mean: Tensor) -> tuple[float, float]:
    """Between which 95 % of differences lie, if documents are drawn with replacement.

    gains: [n] squared error that one SAE of a pair has less, by document.
    """
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(RESAMPLED // 100):
        drawn = torch.randint(len(gains), (100, len(gains)), generator=generator)
        shares.append(gains[drawn].sum(1) / from_mean[drawn].sum(1))
    low, high = torch.cat(shares).quantile(gains.new_tensor([0.025, 0.975])).tolist()
    return low, high


def compare(names: Sequence[str], beside: Sequence[str], folder: str) -> str:
    """A table of explained variance, a row for each pair and one for their means."""
    if len(names) != len(beside):
        raise InputError(f"expected as many SAEs --beside, {len(names)}; got {len(beside)}")
    saes = {name: load(name) for name in (*names, *beside)}
    cache = opened(folder, saes)
    read = {name: tokens_read(sae, cache) for name, sae in saes.items()}
    most = max(read, key=lambda name: read[name])
    parts = list(unseen(cache, read[most]))
    if not parts:
        raise InputError(
            f"{most} may have read {read[most]:,} of the {cache.index.train_rows:,} tokens of "
            f"{folder}, and no whole shard is left: train on fewer --tokens"
        )
    x, document = map(torch.cat, zip(*parts, strict=True))
    for rule in filter(None, (rule_of(sae.metadata) for sae in saes.values())):
        usual = ~rule(x)  # what one SAE leaves out is left out for all
        x, document = x[usual], document[usual]
    document = document.unique(return_inverse=True)[1]
    from_mean, wrong, l0 = errors([saes[name] for name in (*names, *beside)], x, document)
    count = len(names)

    def row(name: str, of: slice, against: slice) -> list[str]:
        """The cells of a pair, or of the means over several."""
        one, other = wrong[of].mean(0), wrong[against].mean(0)
        gains, texts = other - one, "too few documents"
        if len(gains) >= LEAST_DOCUMENTS:
            texts = "{:+.4f} to {:+.4f}".format(*interval(gains, from_mean))
        explained = [
            f"{1 - error.sum() / from_mean.sum():.4f} (L0 {l0[which].mean():.1f})"
            for error, which in ((one, of), (other, against))
        ]
        return [name, *explained, f"{gains.sum() / from_mean.sum():+.4f}", texts]

    rows = [
        row(name, slice(i, i + 1), slice(count + i, count + i + 1)) for i, name in enumerate(names)
    ]
    rows.append(row("mean", slice(count), slice(count, None)))
    header = ["SAE", "explained variance", "the SAE beside", "more", "95 % of resampled texts"]
    return f"{len(x):,} tokens in {len(from_mean):,} documents\n\n{markdown(header, rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        print(compare(options.saes, options.beside, options.cache))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
