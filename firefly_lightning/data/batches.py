"""Micro-batches: the tensors that a training step receives, and the order in which a rank receives them."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from firefly_lightning.data.division import Division
from firefly_lightning.data.plan import Rows, StepPlan
from firefly_lightning.data.tokenized_rows import NO_WINDOW, TokenizedRow, TokenizedRows
from firefly_lightning.processes import end_with_parent, leave_interrupts_to_parent


class PaddedRows(TypedDict):
    """Rows as tensors.

    All indices are made here, on the host, so that a step neither waits for the device nor depends on values.

    Attributes:
        input_ids: (rows, length) token ids, padded on the right.
        attention_mask: (rows, length) 1 for tokens, 0 for padding.
        target_positions: (targets,) positions in the flattened (rows · length) whose next token is learned.
        target_ids: (targets,) ids of the tokens that are learned at these positions.
        lengths: Number of tokens of each row.
        token_positions: (tokens,) positions in the flattened (rows · length) that are no padding.
        packed_targets: (targets,) where each of ``target_positions`` is in ``token_positions``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    target_positions: Tensor
    target_ids: Tensor
    lengths: list[int]
    token_positions: Tensor
    packed_targets: Tensor


class MicroBatch(PaddedRows):
    """The rows that one rank works on at a time.

    Attributes:
        rows: (rows,) which rows these are; empty in a micro-batch that only fills up a step of few rows.
        kinds: (rows,) number of each row's kind.
        asks: (rows,) whether each row asks something; a document does not.
        step: Optimizer step that the micro-batch belongs to.
        step_rows: Number of rows of the whole step, over all its micro-batches and ranks.
        step_target_tokens: Number of learned tokens of the whole step, over all its micro-batches and ranks.
        step_micro_batches: Number of micro-batches of the whole step, over all ranks.
    """

    rows: Tensor
    kinds: Tensor
    asks: Tensor
    step: int
    step_rows: int
    step_target_tokens: int
    step_micro_batches: int


class PlannedBatches(Dataset[MicroBatch]):
    """The micro-batches of one rank; item ``i`` is the rank's ``i``-th since the first step of the run, from 0.

    Args:
        rows: The tokenised rows.
        plan: The plan that says which rows make a step.
        division: How ranks and micro-batches share a step.
        rank: Number of this rank.
        pad_id: Token id of padding.

    Attributes:
        steps_per_epoch: Number of optimizer steps that count as an epoch; the plan's unless the trainer limits them.
    """

    def __init__(self, rows: TokenizedRows, plan: StepPlan, division: Division, rank: int, pad_id: int) -> None:
        self.rows = rows
        self.plan = plan
        self.division = division
        self.rank = rank
        self.pad_id = pad_id
        self.steps_per_epoch = plan.steps_per_epoch
        self._last_shared: tuple[int, list[list[Rows]]] = -1, []

    @property
    def micro_batches_per_step(self) -> int:
        """Number of micro-batches that a rank takes for a step."""
        return self.division.micro_batches

    def __len__(self) -> int:
        return self.steps_per_epoch * self.micro_batches_per_step

    def __getitem__(self, index: int) -> MicroBatch:
        step, position = divmod(index, self.micro_batches_per_step)
        rows = self._shared(step)[self.rank][position]
        return {
            **self.collated(rows),
            "rows": torch.from_numpy(rows),
            "kinds": torch.from_numpy(self.rows.kind_ids[rows].astype(np.int64)),
            "asks": torch.from_numpy(self.rows.windows[rows] == NO_WINDOW),
            "step": step,
            "step_rows": len(self.plan.rows(step)),
            "step_target_tokens": self.plan.target_tokens(step),
            "step_micro_batches": self.micro_batches_per_step * self.division.ranks,
        }

    def _shared(self, step: int) -> list[list[Rows]]:
        if self._last_shared[0] != step:  # its micro-batches are asked for one after another
            self._last_shared = step, self.division.shared(self.plan.rows(step), self.plan.lengths)
        return self._last_shared[1]

    def collated(self, rows: Rows) -> PaddedRows:
        """Rows, by their numbers, as tensors; a subclass whose rows are something else makes others of them."""
        return collate([self.rows[row] for row in rows], self.pad_id)

    def count_kinds(self) -> dict[str, int]:
        """Number of rows of each kind in the plan, each counted once."""
        taken = np.concatenate([part.rows for part in self.plan.sources])
        counts = np.bincount(self.rows.kind_ids[taken], minlength=len(self.rows.kinds))
        return {kind: int(count) for kind, count in zip(self.rows.kinds, counts, strict=True) if count}


class EpochSampler(DistributedSampler[int], SequentialSampler):
    """Indices into :class:`PlannedBatches` for one epoch after another, from a given step on.

    It is a ``DistributedSampler``, since it gives a rank its share; Lightning then calls ``set_epoch`` and does not put
    a sampler of its own in its place. It is a ``SequentialSampler``, since the plan has shuffled the rows already;
    Lightning would put one in its place for ``overfit_batches``.

    Args:
        batches: The micro-batches that are indexed.
        first_step: Optimizer step to begin with; the epoch that holds it is cut short at its front.
    """

    def __init__(self, batches: PlannedBatches, first_step: int = 0) -> None:
        super().__init__(batches, batches.division.ranks, batches.rank, shuffle=False)
        self.batches = batches
        self.first_step = first_step
        # Lightning makes the first iterator before it says which epoch a resumed run is in.
        self.epoch = first_step // batches.steps_per_epoch

    def __iter__(self) -> Iterator[int]:
        per_epoch, per_step = len(self), self.batches.micro_batches_per_step
        end = (self.epoch + 1) * per_epoch
        return iter(range(max(self.epoch * per_epoch, self.first_step * per_step), end))

    def __len__(self) -> int:
        return len(self.batches)


class PlanLoader(DataLoader[MicroBatch]):
    """A loader that Lightning takes for resumable, as it has a state; the data module makes it begin at the right step.

    Attributes:
        seconds_waited: Seconds that iterating over the loader has waited for micro-batches, in all.
    """

    seconds_waited = 0.0

    def __iter__(self) -> Any:
        """Iterates over micro-batches, timing the wait for each; workers begin at once."""
        return self._timed(super().__iter__())

    def _timed(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.seconds_waited += time.perf_counter() - start
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """An empty state: :meth:`FireflyDataModule.state_dict` has the step to resume at."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads nothing, since the state is empty."""


def data_parallel_share(strategy: Any) -> tuple[int, int]:
    """How many ranks share the rows, and the number of this one; ranks that split a model count as one.

    Args:
        strategy: Lightning's strategy; None means one device.
    """
    share = getattr(strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
    return share["num_replicas"], share["rank"]


def first_turns(batch: PaddedRows) -> list[tuple[list[int], list[int]]]:
    """For each row, the token ids up to its first target, and the ids of that target; later turns are left out."""
    width = batch["input_ids"].shape[1]
    ids, learned = batch["input_ids"].tolist(), np.array(batch["target_positions"].cpu()) + 1
    turns = []
    for index in np.unique(learned // width):
        at = learned[learned // width == index] % width
        end = at[0] + np.sum(at - at[0] == np.arange(len(at)))  # input and separator part later targets from the first
        turns.append((ids[index][: at[0]], ids[index][at[0] : end]))
    return turns


def closing_targets(batch: PaddedRows, eos_token_id: int) -> Tensor:
    """(targets,) which of the targets are the end token that closes their row; a row that was cut may have none."""
    rows = batch["target_positions"] // batch["input_ids"].shape[1]
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    return last & (batch["target_ids"] == eos_token_id)


def collate(rows: Sequence[TokenizedRow], pad_id: int) -> PaddedRows:
    """Pads rows to the longest and finds their targets; no rows give one padding token, which teaches nothing."""
    longest = max((len(row.input_ids) for row in rows), default=1)
    input_ids = np.full((max(len(rows), 1), longest), pad_id, np.int64)
    attention_mask = np.zeros_like(input_ids)
    positions, targets = [_NO_POSITIONS], [_NO_POSITIONS]
    for index, (ids, mask) in enumerate(rows):
        input_ids[index, : len(ids)] = ids
        attention_mask[index, : len(ids)] = 1
        learned = np.flatnonzero(mask)
        positions.append(index * longest + learned - 1)  # the position before a token predicts it
        targets.append(ids[learned].astype(np.int64))
    attention_mask[len(rows) :, 0] = 1  # a row of padding alone would make softmax see no position
    tokens, target_positions = np.flatnonzero(attention_mask), np.concatenate(positions)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "target_positions": torch.from_numpy(target_positions),
        "target_ids": torch.from_numpy(np.concatenate(targets)),
        "lengths": attention_mask.sum(1).tolist(),
        "token_positions": torch.from_numpy(tokens),
        "packed_targets": torch.from_numpy(np.searchsorted(tokens, target_positions)),
    }


_NO_POSITIONS: Rows = np.zeros(0, np.int64)


def make_loader(
    batches: PlannedBatches,
    workers: int,
    pin_memory: bool,
    loader: type[DataLoader[MicroBatch]] = DataLoader,
    first_step: int = 0,
) -> DataLoader[MicroBatch]:
    """A loader of planned micro-batches.

    Args:
        batches: The micro-batches to load.
        workers: Number of processes that prepare micro-batches; 0 for none.
        pin_memory: Whether micro-batches are put into page-locked memory.
        loader: Class of the loader.
        first_step: The optimizer step that the loader begins with.
    """
    return loader(
        batches,
        batch_size=None,
        sampler=EpochSampler(batches, first_step),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_begin_loading,
    )


def _begin_loading(worker: int) -> None:
    """Begins a loader's worker: seeds it as Lightning seeds workers by default, and has it end with its run."""
    pl_worker_init_function(worker)
    leave_interrupts_to_parent()
    end_with_parent()
