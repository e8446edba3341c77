"""Which names are weights, of which form, and which of them belong together.  Pure: names in, names out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from mmsplit.checkpoint.tensor import ShardForm


class WeightForm(NamedTuple):
    """One form of weight files: the ends of their names, and that of the index, where the form has one.

    `one_model`: files of different families are one model unless a family is preferred; else each is a model.
    """

    form: ShardForm
    suffixes: tuple[str, ...]
    index_suffix: str | None
    one_model: bool


#: In order of preference: where a directory has several, the first is the checkpoint.
FORMS: Final = (
    WeightForm("safetensors", (".safetensors",), ".safetensors.index.json", True),
    WeightForm("torch", (".bin", ".pt", ".pth", ".ckpt"), ".bin.index.json", True),
    WeightForm("gguf", (".gguf",), None, False),
)
#: Families of weight names that belong together, in order of preference; any other family comes after them.
PREFERRED_FAMILIES: Final = (
    "model",
    "diffusion_pytorch_model",
    "pytorch_model",
    "consolidated",
    "adapter_model",
)
#: Files that hold weights, of whatever framework; never carried along as small files.
WEIGHT_SUFFIXES: Final = frozenset(
    f".{suffix}"
    for suffix in (
        *("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5"),
        *("msgpack", "onnx", "onnx_data", "tflite", "ot", "pdparams", "nemo"),
    )
)
#: What trainers write beside the weights, in the same form.
_NOT_WEIGHTS: Final = ("optimizer", "optim", "scheduler", "training_args", "rng_state", "scaler", "random_states")
#: The projector of a multimodal model: a file beside the model, not a choice.
_PROJECTOR: Final = "mmproj"
_NUMBERED: Final = re.compile(
    r"^(?P<family>.+)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})(?P<suffix>\.[a-z]+)$", re.ASCII
)
#: Partition sets may live beside the checkpoint they came from, and what was exported has a record of it; neither is
#: part of a checkpoint.
_PARTITION_FILE: Final = re.compile(
    r"^(partition_(\d+|set)\.(json|bin)(\..*)?|unfinished_(split|merge)\.json|mmsplit_export\.json)$", re.ASCII
)


class Numbered(NamedTuple):
    """A name that says which of how many files it is: `digits` is the number's width, `of` the count as written."""

    family: str
    digits: int
    of: str
    suffix: str

    @property
    def file_count(self) -> int:
        """How many files there are to be."""
        return int(self.of)

    def sibling(self, number: int) -> str:
        """Return the name of file `number`, counted from 1."""
        return f"{self.family}-{number:0{self.digits}d}-of-{self.of}{self.suffix}"


def parse_numbered(name: str) -> Numbered | None:
    """Return what a name such as `model-00001-of-00003.safetensors` says; None for any other."""
    found = _NUMBERED.match(name)
    return None if found is None else Numbered(found["family"], len(found["number"]), found["count"], found["suffix"])


def form_of(name: str) -> WeightForm | None:
    """Return the form that the end of a name promises; None if it is none that is read, or not of a model."""
    suffix = PurePosixPath(name).suffix.lower()
    form = next((form for form in FORMS if suffix in form.suffixes), None)
    return None if is_partition_file(name) or name.startswith(_NOT_WEIGHTS) else form


def is_weights(name: str, form: WeightForm) -> bool:
    """Whether a name is that of weights in this form."""
    return form_of(name) is form


def index_form(name: str) -> WeightForm | None:
    """Return the form whose weights index has such a name."""
    return next((form for form in FORMS if form.index_suffix and name.endswith(form.index_suffix)), None)


def is_partition_file(name: str) -> bool:
    """Whether a name is one of ours."""
    return _PARTITION_FILE.match(name) is not None


def family_of(name: str) -> str:
    """Return what files of one model have in common: the name without number and ending."""
    numbered = parse_numbered(name)
    if numbered is not None:
        return numbered.family
    stem = name.removesuffix(PurePosixPath(name).suffix)
    return re.sub(r"\.\d\d$", "", stem) if name.endswith(".pth") else stem  # consolidated.00.pth


def choose_family(weights: Iterable[str], index_families: Sequence[str]) -> str | None:
    """Return the preferred family, or the only one that has an index; None where no family is preferred."""
    families = {family_of(name) for name in weights} | set(index_families)
    preferred = next((name for name in PREFERRED_FAMILIES if name in families), None)
    return index_families[0] if preferred is None and len(index_families) == 1 else preferred


def models_apart(weights: Iterable[str]) -> list[str]:
    """Return the families of which each is a model of its own, such as quantisations of one; projectors left out."""
    return sorted({family for name in weights if not (family := family_of(name)).startswith(_PROJECTOR)})
