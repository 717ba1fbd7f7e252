"""Safetensors files of a Hugging Face directory, mapped into memory tensor by tensor."""

import collections
import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from g4attn_jax.checkpoint.errors import CheckpointError, listed
from g4attn_jax.json_file import parse_object, read_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Other dtypes are those of quantised weights, whose scales and layouts this package does not know.
_FLOATS = {"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32}
_INTEGERS = {"I32": np.int32, "I64": np.int64}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file; `dtype` is the format's name for it, such as "BF16"."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        return self.dtype in _FLOATS

    @property
    def is_integer(self) -> bool:
        return self.dtype in _INTEGERS

    def read(self) -> np.ndarray:
        """Maps the tensor into memory, read-only: it is read from the disk when it is first used.

        The mapping ends with the array, so memory does not grow as a file is read. (`get_tensor` of
        safetensors 0.8 maps all of the file and copies the tensor to the heap.)
        """
        dtype = np.dtype((_FLOATS | _INTEGERS)[self.dtype])
        return np.memmap(self.file, dtype, "r", self.offset, self.shape).view(np.ndarray)


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a directory, from the headers of its files alone.

    Args:
        directory: has `model.safetensors`, or `model.safetensors.index.json` and the files that
            it names. Where both are there the index is not read, as by
            `PreTrainedModel.from_pretrained` of transformers.

    Raises:
        CheckpointError: a file is missing or corrupt, or files and index contradict each other; the
            message names the file and the tensor.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return _read_header(single)
    if index.is_file():
        return _indexed(directory, _read_index(index))
    raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_index(path):
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensors to files")
    for name, file in weight_map.items():
        # A path would let an index read, and have mapped, files outside its directory.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} says {name} is in {file!r}; accepted: a file name")
    return weight_map


def _indexed(directory, weight_map):
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise CheckpointError(f"{INDEX_FILE} names {listed(missing)}; {directory} has no such file")
    tensors, expected = {}, collections.defaultdict(set)
    for name, file in weight_map.items():
        expected[file].add(name)
    for file in files:
        header = _read_header(directory / file)
        if absent := expected[file] - header.keys():
            raise CheckpointError(
                f"{INDEX_FILE} says that {file} has {listed(absent)}; it does not"
            )
        if extra := header.keys() - expected[file]:
            raise CheckpointError(f"{file} has {listed(extra)}; {INDEX_FILE} does not say so")
        tensors |= header
    return tensors


def _read_header(path):
    try:
        # Checks all that can be: the header's form, that its tensors fill the file without gap or
        # overlap, and that the file is as long as they say.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is truncated: {error}"
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    try:
        header = parse_object(text, path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"]
        )
        for name, entry in header.items()
    }


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        CheckpointError: there is no such file, or it is not a JSON object without duplicate names.
    """
    try:
        return read_object(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
