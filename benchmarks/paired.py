"""Two kinds of SAE, pair by pair, on tokens that neither saw: `python -m benchmarks.paired`.

    python -m benchmarks.paired --cache cache --layer 10 A-0 A-1 A-2 --beside B-0 B-1 B-2

The tokens are those of the cache after all that the SAEs can have read in training, so that no
setting was chosen on them either. Documents are resampled to tell how far a difference depends on
the text. (Not contexts: a long document of an unusual kind fills many, one after the other.)
"""

import argparse
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kronsae import SAE, load
from kronsae.cache.reader import CacheActivations
from kronsae.errors import InputError
from kronsae.model.massive import rule_of
from kronsae.system.tables import markdown

RESAMPLED = 10_000


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.paired", description=str(__doc__).splitlines()[0])
    given = parser.add_argument
    given("saes", nargs="+", help="SAEs that were trained on the cache")
    given("--beside", nargs="+", required=True, help="as many SAEs to compare them with")
    given("--cache", required=True, help="folder that kronsae harvest wrote")
    given("--layer", type=int, required=True, help="residual stream, from 0")
    return parser


def tokens_read(sae: SAE) -> int:
    """Tokens at the start of a cache that an SAE can have been trained on.

    Raises InputError if it did not read a cache in the order of the stream.
    """
    data = sae.metadata.get("data", {})
    if data.get("order") != "stream":
        raise InputError(
            "expected SAEs trained with --activations-order stream, which leave the end of a cache "
            f"unread; got the order {data.get('order')!r}"
        )
    return sae.metadata["tokens"] + data["buffer_tokens"]


def unseen(cache: CacheActivations, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations [r, d], and the document of each [r], of the shards from token `first` on.

    A document ends at a special token, which no mask includes, as it does not the first of a
    context.
    """
    tokens = documents = 0
    for number, (_, mask, rows) in enumerate(cache.text_in_order()):
        if number < len(cache.index.heldout):
            continue
        if tokens >= first:
            ends = ~mask
            ends[:, 0] = False
            document = documents + ends.flatten().cumsum(0).view_as(mask)
            documents = int(document[-1, -1])
            yield rows, document[mask]
        tokens += len(rows)


@torch.no_grad()
def errors(saes: Sequence[SAE], x: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance [n] from the mean, and squared error [s, n] of each SAE, by document."""

    def by_document(squares: Tensor) -> Tensor:
        sums = torch.zeros(int(document.max()) + 1, dtype=torch.float64)
        return sums.index_add_(0, document, squares.double())

    from_mean = by_document((x - x.mean(0)).square().sum(1))
    wrong = [
        torch.cat([(sae(part).x_hat - part).square().sum(1) for part in x.split(2048)])
        for sae in saes
    ]
    return from_mean, torch.stack([by_document(squares) for squares in wrong])


def interval(gains: Tensor, from_mean: Tensor) -> tuple[float, float]:
    """Between which 95 % of differences lie, if documents are drawn with replacement.

    gains: [n] squared error that one SAE of a pair has less, by document.
    """
    drawn = torch.randint(
        len(gains), (RESAMPLED, len(gains)), generator=torch.Generator().manual_seed(0)
    )
    shares = gains[drawn].sum(1) / from_mean[drawn].sum(1)
    low, high = shares.quantile(shares.new_tensor([0.025, 0.975])).tolist()
    return low, high


def compare(names: Sequence[str], beside: Sequence[str], cache: CacheActivations) -> str:
    """A table of explained variance, a row for each pair and one for their means."""
    if len(names) != len(beside):
        raise InputError(f"expected as many SAEs --beside, {len(names)}; got {len(beside)}")
    saes = [load(name) for name in (*names, *beside)]
    parts = list(unseen(cache, max(map(tokens_read, saes))))
    if not parts:
        raise InputError("the SAEs read all of the cache: harvest more --tokens")
    x, document = map(torch.cat, zip(*parts, strict=True))
    rule = rule_of(saes[0].metadata)
    if rule is not None:
        usual = ~rule(x)
        x, document = x[usual], document[usual]
    document = document.unique(return_inverse=True)[1]
    from_mean, wrong = errors(saes, x, document)
    ours, theirs = wrong.unflatten(0, (2, -1))
    pairs = [*zip(names, ours, theirs, strict=True), ("mean", ours.mean(0), theirs.mean(0))]
    rows = []
    for name, one, other in pairs:
        explained = [f"{1 - error.sum() / from_mean.sum():.4f}" for error in (one, other)]
        gains = other - one
        low, high = interval(gains, from_mean)
        more = f"{gains.sum() / from_mean.sum():+.4f}"
        rows.append([name, *explained, more, f"{low:+.4f} to {high:+.4f}"])
    header = ["SAE", "explained variance", "the SAE beside", "more", "95 % of resampled texts"]
    return f"{len(x):,} tokens in {len(from_mean):,} documents\n\n{markdown(header, rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        cache = CacheActivations(options.cache, layer=options.layer, batch_size=1)
        print(compare(options.saes, options.beside, cache))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
