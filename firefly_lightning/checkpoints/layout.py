"""Every name in a checkpoint: its files and the keys in them.

A portable checkpoint is a folder that every strategy writes and reads, on any number of processes:

    checkpoint.json                names, sizes and xxh3_128 digests of the other files; written last
    trainer.ckpt                   what Lightning saves except tensors: loops, schedule, data, format, settings
    model-*.safetensors            weights by their Hugging Face names, in float32 where the run keeps float32 masters
    model.safetensors.index.json   in which file each of these weights is, as Hugging Face writes it
    module-*.safetensors           weights of a module around the model, if it has any, by their names there
    optimizer-*.safetensors        states of the optimizer: ``exp_avg/NAME`` and so on, tensors of any shape; where one
                                   is made of others, these: ``exp_avg.codes/NAME``

Every process writes files of its own, a bounded number of bytes at a time.

An engine's own checkpoint is a folder that the same strategy reads on the same number of processes:

    trainer.ckpt                   as in a portable checkpoint, and which engine wrote the other files
    checkpoint/                    DeepSpeed's: a file for each process, in DeepSpeed's own format
    weights/                       ColossalAI's: the weights, unsharded
    optimizer-*.ckpt               ColossalAI's: for each process, its part of the optimizer's states
    rank-*.pt                      PyTorch's: for each process, its parts of weights and optimizer states
    digests.json                   names, sizes and xxh3_128 digests of the other files; written last

A checkpoint of an adapter, in any of these forms, holds only the weights that are trained.

Where a checkpoint is not to be portable or cannot be, one device and ``ddp`` write a single file as Lightning does,
with its digest at its end. In that file and in ``trainer.ckpt``, keys that are not named here are Lightning's own.
"""

import re

MANIFEST = "checkpoint.json"
"""File of a portable checkpoint with the names, sizes and digests of its other files."""

DIGESTS = "digests.json"
"""File of an engine's own checkpoint with the names, sizes and digests of its other files."""

TRAINER_FILE = "trainer.ckpt"
"""File of a checkpoint folder with all that Lightning saves except weights and optimizer states."""

INDEX = "model.safetensors.index.json"
"""File of a portable checkpoint that says in which of the other files each weight of the model is."""

FORMAT = 1
"""Number of the portable format, which the manifest names."""

MODEL = "model"
"""Kind of the tensors that are weights of the Hugging Face model; the names of their files begin with it."""

MODULE = "module"
"""Kind of the tensors that are weights or buffers of the module around the model; their files' names begin with it."""

OPTIMIZER = "optimizer"
"""Kind of the tensors that are states of the optimizer; the names of their files begin with it."""

MODEL_PREFIX = "model."
"""Prefix that a ``LightningModule`` puts before the names of the weights of its Hugging Face model."""

WEIGHT = ""
"""Key of a parameter's weight beside its optimizer states, in the dictionaries that strategies exchange."""

VERSION_KEY = "pytorch-lightning_version"
"""Key of Lightning's version, by which Lightning recognises the checkpoint of a run."""

DESCRIPTION_KEY = "hugging_face"
"""Key of the description: all that a Hugging Face folder holds except the weights."""

ADAPTER_KEY = "adapter"
"""Key of the adapter that was trained: its configuration, and path and digest of the base, which is not saved."""

CONFIGURATION_KEY = "configuration"
"""Key of the whole configuration of the run, as YAML."""

SCALER_KEY = "MixedPrecision"
"""Key of the state of the scaler of a float16 loss; the one under which Lightning keeps its own scaler's."""

NAMES_KEY = "optimizer_parameters"
"""Key of the names of each optimizer's parameters, in the order of their numbers; only in a checkpoint of one file."""

SETTINGS_KEY = "changed_settings"
"""Key of the settings of each optimizer that schedules have changed in the run, such as ``lr`` and ``betas``."""

LAST_STEP_KEY = "last_step"
"""Key of the metrics of the last step, which are logged only after the step is saved."""

RUN_KEY = "run"
"""Key of the run that saved a checkpoint: when it ``began``, and the versions under which its ``logs`` are kept."""

TENSOR_KEYS = ("state_dict", "optimizer_states", NAMES_KEY)
"""Keys of a checkpoint of one file that ``trainer.ckpt`` lacks: the files beside it hold these tensors by name."""

SCALARS_KEY = "optimizer_scalars"
"""Key of the numbers that an optimizer counts, such as ``step``: those that parameters share, and those that differ.

Under ``forms`` among them is how tensors that are made of others are put together; see ``optim/states.py``."""

TIED_KEY = "tied"
"""Key of the names of weights that share a tensor, each with the name under which the tensor is stored."""

WRITER_KEY = "written_by"
"""Key that says which strategy wrote an engine's own checkpoint, and on how many processes."""

DIGESTED_KEY = "digests"
"""Key, beside the settings of the writer, that says that there are digests: an older release wrote none."""

REFERENCE_KEY = "reference_log_probs"
"""Key of the log-probabilities that a run tunes preferences against: (pairs, 2) by the digest of the pairs."""

FILES_KEY = "tensor_files"
"""Key of the names of the files of tensors in a portable checkpoint, none of which may be missing."""

BY_NAME = "by_name"
"""Key of an optimizer's states by parameter name, in memory only, until the parameters are numbered."""

DEEPSPEED_FOLDER = "checkpoint"
"""Folder of DeepSpeed's shards; DeepSpeed calls such a name a tag."""

COLOSSALAI_WEIGHTS = "weights"
"""Folder of the weights that ColossalAI saves."""


def tensor_file(kind: str, rank: int, number: int) -> str:
    """Name of a file of a portable checkpoint.

    Args:
        kind: Kind of the tensors in the file.
        rank: Number of the process that writes it.
        number: How many files of this kind the process has written before.
    """
    return f"{kind}-{rank}-{number}.safetensors"


def is_tensor_file(file: str) -> bool:
    """Whether a file's name is one that :func:`tensor_file` gives."""
    return re.fullmatch(rf"({MODEL}|{MODULE}|{OPTIMIZER})-\d+-\d+\.safetensors", file) is not None


def kind_of(file: str) -> str | None:
    """Kind of the tensors in a file of a portable checkpoint; None where the file holds no tensors."""
    return file.partition("-")[0] if file.endswith(".safetensors") else None


def stored_name(key: str, name: str) -> tuple[str, str]:
    """Kind of a tensor of a portable checkpoint, and its name in the file.

    Args:
        key: Key of the optimizer's state, or :data:`WEIGHT` for the weight itself.
        name: The parameter's name in the ``LightningModule``.
    """
    if key != WEIGHT:
        return OPTIMIZER, f"{key}/{name}"
    return (MODEL, name.removeprefix(MODEL_PREFIX)) if name.startswith(MODEL_PREFIX) else (MODULE, name)


def name_in_module(kind: str, stored: str) -> str:
    """Name of a weight in the ``LightningModule``, from the kind and the name under which it is stored."""
    return MODEL_PREFIX + stored if kind == MODEL else stored


def colossalai_states_file(rank: int) -> str:
    """Name of the file with a process's part of ColossalAI's optimizer states."""
    return f"optimizer-{rank}.ckpt"


def native_part_file(rank: int) -> str:
    """Name of the file with a process's parts of weights and optimizer states under PyTorch's own parallelism."""
    return f"rank-{rank}.pt"
