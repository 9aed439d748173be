"""Negatives per token that need no memory: a systematic sample, known from a few numbers.

A token's draws are made from its number alone, wherever they are needed, and the draw can be
inverted: which tokens drew an item is known without a search. So no table of draws is ever kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

COIN_BITS = 31
"""Coins are whole numbers of so many bits."""

CELLS_IN_A_PIECE = 16
"""Cells of one alias whose gradient is summed by itself; see ``Popularity``."""


class Draw(NamedTuple):
    """``n_negatives`` draws of each token, from a catalogue of n = ``n_items``.

    Tokens are cut into segments of n. In slot k, the token in place i of its segment takes cell
    (i + offset_k) mod n, where offset_k is drawn uniformly and anew for each slot and segment. Each
    cell stands for one item: a relabelling that is drawn anew each time says for which.

    So each draw is uniform over the catalogue, and the draws of one token are independent of each
    other, exactly, though slots stand in the order of their offsets. Tokens of a segment never
    share a draw within a slot, as if they had drawn without replacement. And cell r was drawn in
    slot k by the token in place (r - offset_k) mod n and nobody else.

    The relabelling multiplies by a number coprime to n, modulo n, three times; before the second
    and the third time, the lower half of the bits is changed by the upper half. This makes two
    tokens as good as any two different items, and others in each slot. Without it, or with one
    product alone, they would be as far apart in every slot, and the loss of a batch would vary
    several times as much where neighbours in the catalogue are alike.

    For a sample that is not uniform, each draw has a coin: coin_k, which is drawn anew as well, and
    coin_step times the number that the relabelling gave, modulo 2^31. The draws of one token, with
    their coins, are independent of each other, exactly.

    Attributes:
        n_items: Size of the catalogue, below 2^31.
        multipliers: Of the relabelling, each coprime to ``n_items`` and below it.
        offsets: int32 [n_segments, n_negatives], increasing within a segment.
        coins: int32 [n_segments, n_negatives], or ``None`` where nobody needs coins.
        coin_step: From one item to the next, the coin grows by so much.
    """

    n_items: int
    multipliers: tuple[int, int, int]
    offsets: Tensor
    coins: Tensor | None
    coin_step: int

    @property
    def n_negatives(self) -> int:
        """Draws of each token."""
        return self.offsets.shape[1]

    def items(self, start: int, stop: int, popularity: Popularity | None = None) -> Tensor:
        """Return the draws of the tokens from ``start`` to ``stop``, int64 [tokens, n_negatives].

        Without ``popularity`` they are uniform over the catalogue.

        Raises:
            ValueError: A draw by popularity has no coins.
        """
        tokens = torch.arange(start, stop, device=self.offsets.device)
        segments = tokens // self.n_items
        places = (tokens % self.n_items)[:, None]
        items = self.relabel((places + self.offsets[segments]).remainder_(self.n_items))
        if popularity is None:
            return items
        if self.coins is None:
            raise ValueError("a draw by popularity needs coins, but this has none")
        coins = (items * self.coin_step + self.coins[segments]).remainder_(2**COIN_BITS)
        return popularity.choose(items, coins)

    def relabel(self, cells: Tensor) -> Tensor:
        """Return the item of each cell, int64."""
        n_items, bits = self.n_items, self.n_items.bit_length() - 1
        first, second, third = self.multipliers
        items = _fold(cells * first % n_items, 0, bits)
        items = _fold(items * second % n_items, n_items - 2**bits, bits)
        return items * third % n_items


def _fold(numbers: Tensor, begin: int, bits: int) -> Tensor:
    """Change the lower half of the bits of 2^bits numbers, those from ``begin``, by the upper half.

    To do so twice is to do nothing.
    """
    shifted = numbers - begin
    folded = shifted ^ (shifted >> max(1, (bits + 1) // 2))
    return torch.where((shifted >= 0) & (shifted < 2**bits), folded + begin, numbers)


def draw(
    n_tokens: int, n_items: int, n_negatives: int, device: torch.device, *, with_coins: bool
) -> Draw:
    """Draw negatives with PyTorch's generator of the CPU, so that no device is waited for.

    Args:
        n_tokens: How many tokens draw.
        n_items: Size of the catalogue.
        n_negatives: Draws of each token.
        device: Where the draws are needed.
        with_coins: Whether coins are drawn as well.
    """
    size = (-(-n_tokens // n_items), n_negatives)
    multipliers = _draw_multipliers(n_items)
    offsets = torch.randint(n_items, size, dtype=torch.int32).sort().values
    coins, coin_step = None, 0
    if with_coins:
        coins = _to_device(torch.randint(2**COIN_BITS, size, dtype=torch.int32), device)
        coin_step = 2 * int(torch.randint(2 ** (COIN_BITS - 1), ())) + 1
    return Draw(n_items, multipliers, _to_device(offsets, device), coins, coin_step)


def _draw_multipliers(n_items: int) -> tuple[int, int, int]:
    found: list[int] = []
    while len(found) < 3:  # noqa: PLR2004
        drawn = torch.randint(n_items, (32,)).tolist()
        found += (number for number in drawn if math.gcd(number, n_items) == 1)
    return found[0], found[1], found[2]


class Popularity(nn.Module):
    """Draws items in proportion to how often they occur, by Walker's alias method.

    Of n cells of the same probability, cell c stands for item c with a chance of its own and for
    another item, its alias, otherwise. One pass fills them (Vose): rare items, those with less
    than their cell, are topped up by frequent ones, each in turn, and a frequent item left with
    less than its cell is topped up by the next. Who tops up whom follows from where the running
    sums of what rare items lack and of what frequent items have in excess lie among each other:
    no loop is needed, and in whole numbers no rounding. Only the chances are rounded, to 2^-31.

    To sum the gradient of an item over the cells whose alias it is, the cells are sorted by alias
    and cut into pieces of at most ``CELLS_IN_A_PIECE``, none with two aliases.

    Args:
        counts: How often each item occurs, int64 [n_items]. Of those that never do none is drawn.

    Attributes:
        thresholds: int32 [n_items]; a draw of a cell is its own item up to this coin.
        aliases: int32 [n_items]; the item beyond it.
        log_chances: log of the chance of each item in a draw, float32 [n_items].
        log_rests: log of the chance of all the other items, float32 [n_items].
        cells: int32 [sum of piece lengths]; the cells that have an alias, sorted by it.
        piece_starts: int32 [n_pieces + 1]; where each piece begins in ``cells``, and their end.
        pieces_by_length: int32 [n_pieces]; the longest first.
        pieces_of_item: int32 [n_items + 1]; the pieces with alias c are those from
            ``pieces_of_item[c]`` to ``pieces_of_item[c + 1]``.

    Raises:
        ValueError: No item occurs.
    """

    thresholds: Tensor
    aliases: Tensor
    log_chances: Tensor
    log_rests: Tensor
    cells: Tensor
    piece_starts: Tensor
    pieces_by_length: Tensor
    pieces_of_item: Tensor

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        n_items, total = len(counts), int(counts.sum())
        if not total:
            raise ValueError(f"expected an item that occurs, got {n_items} counts of 0")
        own, aliases = alias_table(counts)
        # Up to the coin -1, which there is not, to the greatest one.
        thresholds = (own.double() / total * 2**COIN_BITS).ceil().long() - 1

        cells = (own < total).nonzero()[:, 0]
        cells = cells[aliases[cells].argsort(stable=True)]
        n_cells = torch.bincount(aliases[cells], minlength=n_items)
        n_pieces = -(-n_cells // CELLS_IN_A_PIECE)
        pieces_of_item = nn.functional.pad(n_pieces.cumsum(0), (1, 0))
        item = torch.arange(n_items).repeat_interleave(n_pieces)
        nth = torch.arange(len(item)) - pieces_of_item[item]
        lengths = (n_cells[item] - nth * CELLS_IN_A_PIECE).clamp(max=CELLS_IN_A_PIECE)
        for name, numbers in (
            ("thresholds", thresholds),
            ("aliases", aliases),
            ("cells", cells),
            ("piece_starts", nn.functional.pad(lengths.cumsum(0), (1, 0))),
            ("pieces_by_length", lengths.argsort(descending=True, stable=True)),
            ("pieces_of_item", pieces_of_item),
        ):
            self.register_buffer(name, numbers.int(), persistent=False)
        rests = (total - counts).double()
        # log(1 - rest) where the chance is near 1, so that neither logarithm loses its last bits.
        chances = counts.double() / total
        log_chances = torch.where(chances > 0.5, (-rests / total).log1p(), chances.log())  # noqa: PLR2004
        self.register_buffer("log_chances", log_chances.float(), persistent=False)
        self.register_buffer("log_rests", (rests / total).log().float(), persistent=False)

    @property
    def n_items(self) -> int:
        """Size of the catalogue."""
        return len(self.thresholds)

    def choose(self, cells: Tensor, coins: Tensor) -> Tensor:
        """Return the item of each cell, int64, given the coin of each draw."""
        return torch.where(coins <= self.thresholds[cells], cells, self.aliases[cells].long())


def alias_table(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each cell has of its own item, of ``counts.sum()`` in all, and its alias.

    Args:
        counts: int64 [n_items], not all 0; n_items · counts.sum() must be below 2^63.

    Returns:
        Two of int64 [n_items]. A cell that is all its item's own has it for its alias, too.
    """
    n_items, total = len(counts), counts.sum()
    excess = counts * n_items - total  # cells hold `total`, items have n_items times their count
    rare, frequent = (excess < 0).nonzero()[:, 0], (excess >= 0).nonzero()[:, 0]
    lacked, spare = (-excess[rare]).cumsum(0), excess[frequent].cumsum(0)
    own, aliases = counts * n_items, torch.arange(n_items)
    # A rare item's alias is the first frequent item of whom those before took no more than it has.
    lacked_before = lacked + excess[rare]
    aliases[rare] = frequent[torch.searchsorted(spare, lacked_before)]
    # The first rare item that takes more than is left makes it lack something itself, and the next
    # frequent item tops that up.
    taker = torch.searchsorted(lacked, spare, right=True)
    lacks = nn.functional.pad(lacked, (0, 1))[taker] - spare
    lacks[taker == len(rare)] = 0
    own[frequent] = total - lacks
    short = lacks > 0
    aliases[frequent[short]] = frequent[1:][short[:-1]]
    return own, aliases


def _to_device(numbers: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)
