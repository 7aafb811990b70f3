"""FireflyDataModule: from names of files to planned micro-batches."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from firefly_lightning.data.batches import MicroBatch, PlanLoader, PlannedBatches, data_parallel_share, make_loader
from firefly_lightning.data.counts_table import row_summary
from firefly_lightning.data.division import division_of, one_each
from firefly_lightning.data.limits import count_steps, limited_rows, steps_of_run
from firefly_lightning.data.mixing import Share, Source, as_source, check_shares, listed, split
from firefly_lightning.data.plan import Rows, StepPlan, WeightedRows
from firefly_lightning.data.prompt_choice import choose_format
from firefly_lightning.data.row_arrays import TooLong
from firefly_lightning.data.sources.records import DocumentPer, find_sources
from firefly_lightning.data.sources.row_forms import Learn, RowFormat, RowRules
from firefly_lightning.data.token_cache import WHOLE, default_cache_dir
from firefly_lightning.data.tokenized_files import tokenized_files
from firefly_lightning.data.tokenized_rows import NO_WINDOW, TokenizedRows
from firefly_lightning.errors import FireflyError, check_number
from firefly_lightning.huggingface import load_tokenizer
from firefly_lightning.prompt import PromptEncoder, PromptFormat, prompt_format


class FireflyDataModule(L.LightningDataModule):
    """Instruction rows and documents as micro-batches whose optimizer steps do not depend on the number of devices.

    Args:
        tokenizer: Folder or hub name of the tokenizer; ``firefly-fit`` takes the model's.
        train_files: Files, globs or dataset names to train on, plain or as ``{path, weight, cap, epochs}``. A row that
            an earlier file has too is taken from that file only, and reported.
        val_files: Files, globs or dataset names to validate on.
        val_fraction: Fraction of the training rows to validate on instead of ``val_files``, between 0 and 1.
        test_files: Files, globs or dataset names for ``test``; the validation rows where not given.
        predict_files: Files, globs or dataset names whose rows ``predict`` answers; the test or else the validation
            rows where not given. Files are read whole for it: no row is cut or left out, whatever its length.
        batch_size: Rows in one optimizer step, over all devices.
        micro_batch_size: Most rows that one device works on at a time; all of its share where not given. Gradients are
            accumulated over a device's micro-batches: the step stays the same. Nothing has to divide anything.
        max_length: Most tokens of a row, control tokens included.
        too_long: What to do with a longer row: ``truncate`` keeps its first tokens, ``truncate_keep_end`` its last ones
            after the start token, ``drop`` leaves it out.
        prompt: Name of a format (``firefly``, ``firefly_turns``, ``firefly_single``) or its control strings; where not
            given, the one that the checkpoint or else the model was trained with, or else ``firefly``.
        seed: Seed of the order of rows and of the rows chosen by ``val_fraction``.
        num_workers: Number of processes that prepare batches.
        pin_memory: Whether batches are put into page-locked memory, from which a GPU copies faster.
        cache_dir: Where token ids are kept; a folder of the user's cache by default.
        kinds: Shares of kinds of training rows over all files, ``{KIND: {weight, cap, epochs}}``; a row's weight is its
            file's weight times its kind's.
        row_format: Function for rows in a form of your own, such as ``my_rows.dialog``: from a row's fields it gives
            kind and (input, target) turns, or None where the row is in one of the known forms.
        learn: Which targets of a row are learned: ``all``, or only the ``last`` one, which answers all turns before it.
        document_per: What of a ``.txt`` file is a document to learn: each ``line``, or the whole ``file``.
        stride: Tokens of a window with which the next one of a document longer than ``max_length`` begins, as context
            that is not learned again.
        micro_batch_tokens: Most tokens that one device works on at a time, in place of ``micro_batch_size`` or beside
            it: as many rows as fit, in as few micro-batches as the heaviest step of the run allows.

    Attributes:
        token_rows: Class of the tokenised rows that are learned or evaluated; that of a subclass may be another.
        batches: Class of their micro-batches.

    Raises:
        FireflyError: If an argument is out of its range.
    """

    token_rows: type[TokenizedRows] = TokenizedRows
    batches: type[PlannedBatches] = PlannedBatches

    def __init__(
        self,
        tokenizer: str,
        train_files: str | list[str | Source] | None = None,
        val_files: str | list[str] | None = None,
        val_fraction: float = 0.0,
        test_files: str | list[str] | None = None,
        predict_files: str | list[str] | None = None,
        batch_size: int = 16,
        micro_batch_size: int | None = None,
        max_length: int = 512,
        too_long: TooLong = "truncate",
        prompt: str | PromptFormat | None = None,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        cache_dir: str | None = None,
        kinds: dict[str, Share] | None = None,
        row_format: RowFormat | None = None,
        learn: Learn = "all",
        document_per: DocumentPer = "line",
        stride: int = 1,
        micro_batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer_path = tokenizer
        self.train_sources = [as_source(item) for item in listed(train_files)]
        self.kinds = dict(kinds or {})
        self.val_files, self.test_files, self.predict_files = map(listed, (val_files, test_files, predict_files))
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.max_length = max_length
        self.too_long: TooLong = too_long
        self._told = None if prompt is None else prompt_format(prompt)
        self.checkpoint: str | None = None  # that the run begins with; it is told before the format is asked for
        self.seed, self.row_format = seed, row_format
        self.learn: Learn = learn
        self.document_per, self.stride = document_per, stride
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.train: PlannedBatches = None  # type: ignore[assignment]  # until it is set up to train
        self.val: PlannedBatches | None = None
        self.test: PlannedBatches | None = None
        self._stage, self._resumed_step = "", 0
        self._check_arguments()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, loaded when first asked for."""
        return load_tokenizer(self.tokenizer_path)

    @cached_property
    def prompt(self) -> PromptFormat:
        """The format that rows are put into, chosen when first asked for."""
        return choose_format(self._told, self.tokenizer_path, self.tokenizer, rank_zero_info, self.checkpoint)

    @cached_property
    def _encoder(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, self.prompt)

    def rules(self, answering: bool) -> RowRules:
        """How rows are read; a subclass that reads others says so here.

        Args:
            answering: Whether the rows are to be answered, rather than learned.
        """
        return RowRules(self.row_format, self.learn, answering, document_per=self.document_per)

    def tokenized(self, files: Sequence[str], answering: bool = False) -> TokenizedRows:
        """The rows of files as token ids, of the class ``token_rows``, tokenised where the cache lacks them.

        Args:
            files: Files, globs and names of datasets.
            answering: Whether the rows are to be answered; they are then instruction rows, and none is cut.

        Raises:
            FireflyError: If a file cannot be read, or nothing of any row can be learned.
        """
        max_length, kind = (WHOLE, TokenizedRows) if answering else (self.max_length, self.token_rows)
        rules, encoder = self.rules(answering), self._encoder
        return tokenized_files(files, encoder, max_length, self.too_long, self.cache_dir, rules, self.stride, kind)

    def prepare_data(self) -> None:
        """Tokenises what the cache lacks, once per machine, and prints what was kept of every kind."""
        train_files = [source["path"] for source in self.train_sources]
        answered = self._files_to_answer() if getattr(self.trainer, "predicting", False) else []
        needed = [answered] if answered else [train_files, self.val_files, self.test_files]
        find_sources([file for files in needed for file in files])  # a mistyped name is told before rows are read
        for files in needed:
            if files:
                rank_zero_info(row_summary(self.tokenized(files, answering=bool(answered))))

    def setup(self, stage: str) -> None:
        """Maps the token ids, plans the steps and tells the trainer how many micro-batches make a step."""
        self._stage, self._resumed_step = stage, 0
        self.world_size, self.rank = data_parallel_share(self.trainer.strategy if self.trainer else None)
        if stage == "predict" and (answered := self._files_to_answer()):
            rows = self.tokenized(answered, answering=True)
            self.answered = self._prompted(rows, np.arange(len(rows)))
            return
        val_rows = None
        if stage == "fit" or self.val_fraction:
            if not self.train_sources:
                raise FireflyError("data.train_files: nothing to train on; name at least one file")
            files = [(file, source) for source in self.train_sources for file in find_sources([source["path"]])]
            train_rows = self.tokenized([file for file, _ in files])
            taken, held_out = split(
                train_rows, [source for _, source in files], self.kinds, self.val_fraction, self.seed
            )
            self.train = self._planned(train_rows, taken)
            val_rows = self._evaluated(train_rows, held_out[0].rows) if self.val_fraction else None
        self.val = self._of_files(self.val_files) or val_rows
        self.test = self._of_files(self.test_files) or self.val
        if stage == "validate" and not self.val:
            raise FireflyError("data.val_files: nothing to validate on; name a file there, or set data.val_fraction")
        if stage == "predict":
            if not self.val:
                raise FireflyError("data.predict_files: nothing to answer; name a file there")
            self.answered = self._prompted(self.val.rows, self.val.plan.sources[0].rows)
        if stage == "fit" and self.trainer:
            count_steps(self.trainer, self.train)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer step that comes next, and the fingerprint of the plan that says which rows that step has."""
        if self.trainer is None or self.train is None:
            return {}
        return {"step": self.trainer.global_step, "plan": self.train.plan.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes a resumed run take the rows that would have come next.

        Raises:
            FireflyError: If the plan is not the one that the checkpoint was saved under.
        """
        if self._stage != "fit" or not state:
            return
        self.train.plan.check_same(state["plan"])
        self._resumed_step = state["step"]

    def train_dataloader(self) -> DataLoader[MicroBatch]:
        """Micro-batches from the next optimizer step on."""
        # The trainer restores its own count only after a schedule may have asked how many batches there are.
        first_step = self._resumed_step or (self.trainer.global_step if self.trainer else 0)
        return self._loader(self.train, loader=PlanLoader, first_step=first_step)

    def val_dataloader(self) -> DataLoader[MicroBatch] | list[Any]:
        """All validation rows once; no loader where there are no validation rows."""
        return self._loader(self.val) if self.val else []

    def test_dataloader(self) -> DataLoader[MicroBatch]:
        """All test rows once.

        Raises:
            FireflyError: If there are no test rows.
        """
        if not self.test:
            raise FireflyError("data.test_files: nothing to test on; name a file there, or validation files")
        return self._loader(self.test)

    def predict_dataloader(self) -> DataLoader[MicroBatch]:
        """All rows that ``predict`` is to answer, once."""
        return self._loader(self.answered)

    def describe_step(self, step: int) -> list[str]:
        """Source, line and kind of every row of an optimizer step of training."""
        return [self.train.rows.describe(int(row)) for row in self.train.plan.rows(step)]

    def _check_arguments(self) -> None:
        for name in ("batch_size", "micro_batch_size"):
            check_number(f"data.{name}", getattr(self, name), least=1, most=10**6)
        for name in ("max_length", "micro_batch_tokens"):
            check_number(f"data.{name}", getattr(self, name), least=1, most=2**31 - 1)
        check_number("data.num_workers", self.num_workers, least=0, most=1024)
        check_number("data.stride", self.stride, least=1, most=max(1, self.max_length - 1))
        if not 0 <= self.val_fraction < 1:
            raise FireflyError(f"data.val_fraction is {self.val_fraction}; it must be at least 0 and below 1")
        if self.val_fraction and self.val_files:
            raise FireflyError("data.val_fraction and data.val_files are both set; keep one of them")
        check_shares(self.train_sources, self.kinds)

    def _files_to_answer(self) -> list[str]:
        return self.predict_files or self.test_files or self.val_files

    def _of_files(self, files: Sequence[str]) -> PlannedBatches | None:
        """All rows of files, to evaluate."""
        rows = self.tokenized(files) if files else None
        return None if rows is None else self._evaluated(rows, np.arange(len(rows)))

    def _prompted(self, rows: TokenizedRows, taken: Rows) -> PlannedBatches:
        """Rows to answer, all but documents; those whose prompts are of like length share a micro-batch."""
        prompts, taken = rows.lengths - rows.target_tokens, taken[rows.windows[taken] == NO_WINDOW]
        if not len(taken):
            raise FireflyError("data.predict_files: nothing to answer among texts; name a file of questions there")
        return self._evaluated(rows, taken, prompts, PlannedBatches)

    def _planned(self, rows: TokenizedRows, sources: list[WeightedRows]) -> PlannedBatches:
        """Rows to train on."""
        plan = StepPlan(rows.lengths, rows.target_tokens, sources, self.batch_size, self.seed)
        steps = steps_of_run(self.trainer, plan.steps_per_epoch) if self._stage == "fit" else 0
        division = division_of(plan, self.world_size, self.micro_batch_size, self.micro_batch_tokens, steps)
        return self.batches(rows, plan, division, self.rank, self.tokenizer.pad_token_id)

    def _evaluated(
        self,
        rows: TokenizedRows,
        taken: Rows,
        lengths: npt.NDArray[np.int32] | None = None,
        made: type[PlannedBatches] | None = None,
    ) -> PlannedBatches:
        """Each row once, like lengths together, one micro-batch a step and rank."""
        lengths = rows.lengths if lengths is None else lengths
        taken = taken[: limited_rows(self.trainer, self._stage, len(taken), self.batch_size)]
        taken = taken[np.argsort(-lengths[taken], kind="stable")]
        longest, limits = int(lengths[taken].max(initial=0)), (self.micro_batch_size, self.micro_batch_tokens)
        division = one_each(self.batch_size, self.world_size, *limits, longest)
        size = division.rows * self.world_size
        plan = StepPlan(lengths, rows.target_tokens, [WeightedRows(taken)], size, self.seed, shuffle=False)
        return (made or self.batches)(rows, plan, division, self.rank, self.tokenizer.pad_token_id)

    def _loader(self, batches: PlannedBatches, **how: Any) -> DataLoader[MicroBatch]:
        return make_loader(batches, self.num_workers, self.pin_memory, **how)
