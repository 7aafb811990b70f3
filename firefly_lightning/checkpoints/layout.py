"""Every name in a checkpoint: its files and the keys in them.

A portable checkpoint is a folder that every strategy writes and reads, on any number of processes:

    checkpoint.json                names, sizes and xxh3_128 digests of the other files; written last
    trainer.ckpt                   what Lightning saves but for tensors: loops, schedule, data, format, settings
    model-*.safetensors            weights by their Hugging Face names, in float32 where the run keeps float32 masters
    model.safetensors.index.json   in which file each is, as Hugging Face writes it
    module-*.safetensors           weights of a module around the model, by their names there, if there are any
    optimizer-*.safetensors        states of the optimizer: ``exp_avg/NAME`` and so on, a tensor shaped like the weight

Every process writes files of its own, a bounded number of bytes at a time.

An engine's own checkpoint is a folder that the same strategy reads on as many processes:

    trainer.ckpt                   the same, and which engine wrote the rest
    checkpoint/                    of DeepSpeed: a file for each process, in its own format
    weights/                       of ColossalAI: the weights, as one
    optimizer-*.ckpt               of ColossalAI: for each process, its part of the optimizer's states
    rank-*.pt                      of PyTorch: for each process, its parts of all

One device and ``ddp`` write a file as Lightning does, where a checkpoint is not to be portable or cannot be. In a file
and in ``trainer.ckpt``, keys that are not named here are Lightning's own.
"""

MANIFEST = "checkpoint.json"
"""File of a portable checkpoint: names, sizes and digests of its other files."""

TRAINER_FILE = "trainer.ckpt"
"""File of a checkpoint that is a folder: what Lightning saves, but for weights and optimizer states."""

INDEX = "model.safetensors.index.json"
"""File of a portable checkpoint: in which of its files each weight of the model is."""

FORMAT = 1
"""Number of the portable format, which the manifest names."""

MODEL = "model"
"""Kind of tensor, and beginning of its files' names: a weight of the Hugging Face model."""

MODULE = "module"
"""Kind of tensor, and beginning of its files' names: a weight or a buffer of the module around the model."""

OPTIMIZER = "optimizer"
"""Kind of tensor, and beginning of its files' names: a state of the optimizer."""

MODEL_PREFIX = "model."
"""What a ``LightningModule`` puts before the names of its Hugging Face model."""

WEIGHT = ""
"""Key of the weight itself beside the states of the optimizer, in what strategies give and take."""

VERSION_KEY = "pytorch-lightning_version"
"""Key of Lightning's own version, by which it knows the checkpoint of a run."""

DESCRIPTION_KEY = "hugging_face"
"""Key of all that a Hugging Face folder holds beside the weights."""

CONFIGURATION_KEY = "configuration"
"""Key of the whole configuration of the run, as YAML."""

SCALER_KEY = "MixedPrecision"
"""Key of what the scaler of a float16 loss has learned: where Lightning keeps that of its own."""

NAMES_KEY = "optimizer_parameters"
"""Key of the names of each optimizer's parameters, in the order of their numbers; in a file only."""

TENSOR_KEYS = ("state_dict", "optimizer_states", NAMES_KEY)
"""Keys of a file that ``trainer.ckpt`` lacks: the files beside it hold those tensors by name."""

SCALARS_KEY = "optimizer_scalars"
"""Key of what an optimizer counts, such as ``step``: for all parameters, and those that differ."""

TIED_KEY = "tied"
"""Key of the names that share the tensor of another."""

WRITER_KEY = "written_by"
"""Key of which strategy wrote an engine's own folder, and on how many processes."""

BY_NAME = "by_name"
"""Key of an optimizer's state whose parameters go by their names until they are numbered; on no disk."""

DEEPSPEED_FOLDER = "checkpoint"
"""Folder of DeepSpeed's shards, which it calls a tag."""

COLOSSALAI_WEIGHTS = "weights"
"""Folder of the weights that ColossalAI saves."""


def tensor_file(kind: str, rank: int, number: int) -> str:
    """File of a portable checkpoint with tensors of one kind, the so many-th that a process writes."""
    return f"{kind}-{rank}-{number}.safetensors"


def kind_of(file: str) -> str | None:
    """Kind of the tensors in a file of a portable checkpoint; None where it holds none."""
    return file.partition("-")[0] if file.endswith(".safetensors") else None


def stored_name(key: str, name: str) -> tuple[str, str]:
    """Kind of a tensor of a portable checkpoint, and its name in the file.

    Args:
        key: Which state of the optimizer, or :data:`WEIGHT`.
        name: The parameter's name in the ``LightningModule``.
    """
    if key != WEIGHT:
        return OPTIMIZER, f"{key}/{name}"
    return (MODEL, name.removeprefix(MODEL_PREFIX)) if name.startswith(MODEL_PREFIX) else (MODULE, name)


def name_in_module(kind: str, stored: str) -> str:
    """Name in the ``LightningModule`` of a weight, by the kind and the name under which it is stored."""
    return MODEL_PREFIX + stored if kind == MODEL else stored


def colossalai_states_file(rank: int) -> str:
    """File of a process's part of the optimizer's states that ColossalAI keeps."""
    return f"optimizer-{rank}.ckpt"


def native_part_file(rank: int) -> str:
    """File of all that a process holds under PyTorch's own parallelism."""
    return f"rank-{rank}.pt"
