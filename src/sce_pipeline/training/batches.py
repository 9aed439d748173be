"""Shuffled, packed batches of training windows, gathered on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sce_pipeline.evaluation.held_out import check_items
from sce_pipeline.losses.base import Histories
from sce_pipeline.models import Packing
from sce_pipeline.models.packing import send

TOKENS_AT_ONCE = 2**19
"""Tokens gathered at once, for as many batches as they fill: 25 MB, and few kernels a batch."""


@dataclass(frozen=True)
class TrainingBatch:
    """Some windows, packed, or the part of them that one device computes at a time.

    Attributes:
        items: Inputs, int64 [slots]; what follows the windows' own only fills up.
        packing: Which window each slot belongs to.
        targets: The item to predict for each token, int64 [tokens].
        sequence: Which window each token belongs to, int64 [tokens].
        masked: Slots whose item is hidden from the model, bool [slots]; None hides nothing.
        predicted: Slots that the tokens are, int64 [tokens]; None stands for the first ones.
        histories: The items of each window's user, where the loss asks for them.
        counts: Tokens of each rank's part.
        slot_counts: Slots of each rank's part.
        step_tokens: Tokens of the whole optimisation step, those to be predicted.
        ends_step: Whether an optimisation step follows.
    """

    items: Tensor
    packing: Packing
    targets: Tensor
    sequence: Tensor
    masked: Tensor | None
    predicted: Tensor | None
    histories: Histories | None
    counts: list[int]
    slot_counts: list[int]
    step_tokens: int
    ends_step: bool

    def take(self, slots: Tensor) -> Tensor:
        """Take the tokens out of [slots, ...]: [tokens, ...]."""
        if self.predicted is None:
            return slots[: self.targets.numel()]
        return slots.index_select(0, self.predicted)

    def spread(self, tokens: Tensor, room: Tensor | None = None) -> Tensor:
        """Lay [tokens, ...] into [slots, ...], zeros elsewhere: the derivative of ``take``.

        Args:
            tokens: Of the batch's tokens, [tokens, ...].
            room: Where to lay them, [slots, ...]; None takes new memory where it has to.
        """
        n_slots = self.items.numel()
        if room is None:
            if self.predicted is None and len(tokens) == n_slots:
                return tokens
            room = tokens.new_empty(n_slots, *tokens.shape[1:])
        if self.predicted is None:
            room[: len(tokens)] = tokens
            room[len(tokens) :] = 0
            return room
        return room.zero_().index_copy_(0, self.predicted, tokens)


@dataclass(frozen=True)
class Part:
    """The part of a step that one device computes at a time, known on the host.

    Attributes:
        windows: Numbers of the windows, int64 [windows].
        inputs: Inputs of each rank's part, this one's among them.
        counts: Tokens to predict of each rank's part.
        n_inputs: Inputs of this part.
        step_tokens: Tokens to predict in the whole step.
        ends_step: Whether an optimisation step follows.
        mask: Which inputs are masked, and to be predicted, bool [n_inputs]; None predicts what
            follows each.
    """

    windows: Tensor
    inputs: list[int]
    counts: list[int]
    n_inputs: int
    step_tokens: int
    ends_step: bool
    mask: Tensor | None


class TrainingBatches:
    """Epochs of batches: every window once an epoch, in an order that follows from seed and epoch.

    From each item but a window's last the next one is to be predicted; or, with ``draw_mask``, the
    masked ones among the last ``max_length`` items of a window.

    The training items lie on the device, or, where they would take more than half of its free
    memory, in pinned memory of the host. All sizes are known on the host, so that nothing waits.

    Args:
        sequences: The arrays of ``train_sequences``.
        device: Where batches are to be.
        batch_size: Windows of an optimisation step; the last of an epoch has what is left.
        batch_tokens: Most tokens of a step instead, or None. A longer window is a step of its own.
        accumulation_steps: Parts in which each step is computed, one after the other.
        seed: Seed of the order.
        with_histories: Whether batches carry the items of their users.
        rank: Which of ``n_ranks`` devices these batches are for.
        n_ranks: Number of devices that share every step.
        round_up: Slots for a number of tokens; what is left over is filled with sequences that
            nobody reads.
        draw_mask: Draws which tokens of sequences of given lengths, int64 [sequences], are masked:
            bool [tokens], at least one a sequence.

    Raises:
        ValueError: There is no window to train on, fewer than there are parts of a step, or an
            item id lies outside the catalogue.
    """

    def __init__(
        self,
        sequences: Mapping[str, np.ndarray],
        device: torch.device,
        *,
        batch_size: int,
        batch_tokens: int | None = None,
        accumulation_steps: int = 1,
        seed: int,
        with_histories: bool,
        rank: int = 0,
        n_ranks: int = 1,
        round_up: Callable[[int], int] | None = None,
        draw_mask: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        self.device = device
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.rank, self.n_ranks = rank, n_ranks
        self.accumulation_steps = accumulation_steps
        self.n_parts = n_ranks * accumulation_steps
        self.seed = seed
        self.round_up = round_up
        self.draw_mask = draw_mask
        n_items = int(sequences["n_items"][0])
        items = torch.from_numpy(sequences["items"])
        self.starts = torch.from_numpy(sequences["window_starts"])
        self.lengths = torch.from_numpy(sequences["window_stops"]) - self.starts - 1
        if self.n_windows == 0:
            raise ValueError(
                "no user has two training items, so there is nothing to learn from; "
                "lower the filters or move the split"
            )
        if self.n_windows < self.n_parts:
            raise ValueError(
                f"{self.n_windows} training windows cannot be shared out over {n_ranks} devices "
                f"in {accumulation_steps} parts each; lower training.devices or "
                "training.accumulation_steps"
            )
        check_items("training items", sequences["items"], 0, n_items)
        self.histories: Histories | None = None
        if with_histories:
            offsets = torch.from_numpy(sequences["offsets"])
            histories = _distinct_items(items, offsets, n_items)
            self.histories = Histories(_place(histories.items, device), histories.offsets)
            self.users = torch.searchsorted(offsets, self.starts, right=True) - 1
        self.items = _place(items, device)
        max_length = int(sequences["max_length"][0])
        self.filling = min(max_length, items.numel() - 1)
        if draw_mask is not None:
            lengths = (self.lengths + 1).clamp(max=max_length)
            self.starts, self.lengths = self.starts + self.lengths + 1 - lengths, lengths

    @property
    def n_windows(self) -> int:
        """Windows in an epoch."""
        return self.starts.numel()

    @property
    def n_tokens(self) -> int:
        """Tokens in an epoch, of all ranks."""
        return int(self.lengths.sum())

    def steps(self, epoch: int) -> list[list[Part]]:
        """Share the windows of an epoch out: this rank's parts of every optimisation step.

        Args:
            epoch: Number of the epoch, from 1.
        """
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(self.n_windows, generator=generator)
        lengths = self.lengths[order]
        mask = None if self.draw_mask is None else self.draw_mask(lengths, generator)
        ends = np.concatenate([[0], lengths.numpy().cumsum()])
        bounds = np.cumsum([0, *self._step_sizes(lengths.numpy())])
        return [
            self._parts(order, ends, mask, int(first), int(last))
            for first, last in pairwise(bounds)
        ]

    def _step_sizes(self, lengths: np.ndarray) -> list[int]:
        """Cut windows of these lengths into steps, none of which has fewer windows than parts."""
        if self.batch_tokens is None:
            size = max(self.batch_size, self.n_parts)
            sizes = [min(size, len(lengths) - start) for start in range(0, len(lengths), size)]
        else:
            sizes = _fill(lengths.tolist(), self.batch_tokens, self.n_parts)
        if len(sizes) > 1 and sizes[-1] < self.n_parts:
            sizes[-2:] = [sizes[-2] + sizes[-1]]
        return sizes

    def _parts(
        self, order: Tensor, ends: np.ndarray, mask: Tensor | None, first: int, last: int
    ) -> list[Part]:
        """Cut the windows ``first`` to ``last`` of a step evenly; return this rank's parts.

        Args:
            order: All windows of the epoch.
            ends: Inputs before each of them, and in all.
            mask: Which of the inputs are masked.
            first: Where the step starts.
            last: Where it ends.
        """
        cuts = [first + (last - first) * part // self.n_parts for part in range(self.n_parts + 1)]
        places = ends[cuts].tolist()
        inputs = counts = [stop - start for start, stop in pairwise(places)]
        if mask is not None:
            counts = [int(mask[start:stop].sum()) for start, stop in pairwise(places)]
        parts = []
        for number in range(self.accumulation_steps):
            mine = number * self.n_ranks + self.rank
            ranks = slice(number * self.n_ranks, (number + 1) * self.n_ranks)
            parts.append(
                Part(
                    order[cuts[mine] : cuts[mine + 1]],
                    inputs=inputs[ranks],
                    counts=counts[ranks],
                    n_inputs=inputs[mine],
                    step_tokens=sum(counts),
                    ends_step=number == self.accumulation_steps - 1,
                    mask=None if mask is None else mask[places[mine] : places[mine + 1]],
                )
            )
        return parts

    def batches(self, parts: list[Part]) -> Iterator[TrainingBatch]:
        """Gather ``parts``, many at a time, and yield a batch for each."""
        group: list[Part] = []
        for part in parts:
            if group and sum(p.n_inputs for p in group) + part.n_inputs > TOKENS_AT_ONCE:
                yield from self._gather(group)
                group = []
            group.append(part)
        if group:
            yield from self._gather(group)

    def _gather(self, parts: list[Part]) -> Iterator[TrainingBatch]:
        """Gather some parts at once."""
        where = self.items.device
        fillings = [self._filling_lengths(part) for part in parts]
        sizes = [part.windows.numel() for part in parts]
        pairs = list(zip(parts, fillings, strict=True))
        starts = torch.cat([torch.cat([self.starts[p.windows], 0 * f]) for p, f in pairs])
        lengths = torch.cat([torch.cat([self.lengths[p.windows], f]) for p, f in pairs])
        packing = Packing.from_lengths(lengths, where)
        inputs = send(starts, where)[packing.sequence] + packing.place
        items = send(self.items[inputs].long(), self.device)
        targets = items
        if self.draw_mask is None:
            targets = send(self.items[inputs + 1].long(), self.device)
        histories = self._histories(torch.cat([part.windows for part in parts]), sizes)
        packings = packing.to(self.device).split(
            n + len(f) for n, f in zip(sizes, fillings, strict=True)
        )
        start = 0
        for part, packed, own in zip(parts, packings, histories, strict=True):
            slots = slice(start, start + packed.n_tokens)
            yield self._batch(part, items[slots], targets[slots], packed, own)
            start += packed.n_tokens

    def _batch(
        self,
        part: Part,
        items: Tensor,
        targets: Tensor,
        packing: Packing,
        histories: Histories | None,
    ) -> TrainingBatch:
        masked = predicted = None
        tokens: slice | Tensor = slice(part.n_inputs)
        if part.mask is not None:
            predicted = tokens = send(part.mask.nonzero()[:, 0], self.device)
            masked = send(F.pad(part.mask, (0, items.numel() - part.n_inputs)), self.device)
        return TrainingBatch(
            items=items,
            packing=packing,
            targets=targets[tokens],
            sequence=packing.sequence[tokens],
            masked=masked,
            predicted=predicted,
            histories=histories,
            counts=part.counts,
            slot_counts=[*map(self.round_up, part.inputs)] if self.round_up else part.inputs,
            step_tokens=part.step_tokens,
            ends_step=part.ends_step,
        )

    def _filling_lengths(self, part: Part) -> Tensor:
        """Return the lengths of sequences that fill a part up, empty ones at the end.

        They round the number of sequences up too, so that few shapes occur.
        """
        if self.round_up is None:
            return torch.empty(0, dtype=torch.int64)
        full, rest = divmod(self.round_up(part.n_inputs) - part.n_inputs, self.filling)
        lengths = torch.tensor([self.filling] * full + [rest])
        n_windows = part.windows.numel()
        n_fillings = self.round_up(n_windows + len(lengths)) - n_windows
        return F.pad(lengths, (0, n_fillings - len(lengths)))

    def _histories(self, windows: Tensor, sizes: list[int]) -> Iterator[Histories | None]:
        """Gather the items of the windows' users, ``sizes`` windows at a time."""
        if self.histories is None:
            yield from [None] * len(sizes)
            return
        items, offsets = self.histories
        users = self.users[windows]
        where = items.device
        packing = Packing.from_lengths(offsets.diff()[users], where)
        starts = send(offsets[users], where)
        gathered = send(items[starts[packing.sequence] + packing.place], self.device)
        start = 0
        for packed in packing.to(self.device).split(sizes):
            stop = start + packed.n_tokens
            yield Histories(gathered[start:stop], packed.offsets.long())
            start = stop


def _place(items: Tensor, device: torch.device) -> Tensor:
    """Put training items on the device, or in pinned memory where they would crowd it."""
    if device.type == "cuda" and items.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return items.pin_memory()
    return items.to(device)


def _mix(*numbers: int) -> int:
    """Make one seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def _fill(lengths: list[int], most: int, at_least: int) -> list[int]:
    """Cut into runs of at most ``most`` in sum, but at least so many elements; give their sizes."""
    sizes, total = [0], 0
    for length in lengths:
        if sizes[-1] >= at_least and total + length > most:
            sizes.append(0)
            total = 0
        sizes[-1] += 1
        total += length
    return sizes


def _distinct_items(items: Tensor, offsets: Tensor, n_items: int) -> Histories:
    """Sort each user's items and drop repeats, for all users at once."""
    user = torch.repeat_interleave(offsets.diff())
    keys = torch.unique(user * n_items + items)
    counts = torch.bincount(keys // n_items, minlength=offsets.numel() - 1)
    return Histories(keys % n_items, F.pad(counts.cumsum(0), (1, 0)))
