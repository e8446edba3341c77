"""mmsplit: split model checkpoints larger than RAM by layer into verified partitions, and merge them back.

    plan(source, num_parts)              who would get what, from headers alone
    split(source, output, num_parts)     stream it into partition_K.json + partition_K.bin
    verify(path)                         find every byte that is not as it was written
    sign(path, private_key)              vouch for a set with a key
    merge(path, output)                  the original shards again, byte for byte
    export(source, output)               safetensors for any loader, or JSON; load_partition_json(path) reads that
    repartition(path, output, num_parts)    the same model cut another way, its chunks moved as they are
    repair(path, source)                 what is damaged made again, from the checkpoint or another copy
    parity(path, percent)                small files beside the payloads, from which repair needs no source
    open_partition(path)                 a mapping of tensor names to numpy arrays
    open_set(path), open_checkpoint(path), inspect(path)

A source may be a model of the Hub (`org/name`), reached as `hub=HubOptions(...)` says.

    download(model_id)                   into the Hub cache or a folder, resumed and verified
    pull(source, output), push(path, target)    get and publish partition sets
    HubModel(model_id)                   one model at one commit: download, plan, split, export, also async

Names are imported when they are first used, so that `import mmsplit` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmsplit.benchmark.bench import BenchResult, bench
    from mmsplit.checkpoint import Checkpoint, TensorInfo, open_checkpoint
    from mmsplit.errors import (
        AccessDeniedError,
        CheckpointError,
        FormatError,
        GgufFileError,
        HeaderError,
        IndexMismatchError,
        IntegrityError,
        MissingExtraError,
        MissingPartitionError,
        MissingShardError,
        MmsplitError,
        NetworkError,
        NoSpaceError,
        OfflineError,
        OutputError,
        OutputExistsError,
        OutputLockedError,
        PlanError,
        RemoteNotFoundError,
        RequestError,
        SourceChangedError,
        TorchFileError,
    )
    from mmsplit.exporting.parameters_json import ExportedLayer, ExportedPartition
    from mmsplit.exporting.parameters_reader import load_partition_json
    from mmsplit.hub_model import HubModel
    from mmsplit.layers import Layer, LayerMap, build_layer_map
    from mmsplit.loading.partition import Partition
    from mmsplit.loading.partition_set import PartitionSet
    from mmsplit.planning import Plan
    from mmsplit.remote.source import HubOptions, open_source
    from mmsplit.sidecar.scrub_run import Scrub
    from mmsplit.verbs.download import DownloadResult, download
    from mmsplit.verbs.export import ExportResult, export
    from mmsplit.verbs.inspect import inspect
    from mmsplit.verbs.load import open_partition, open_set
    from mmsplit.verbs.merge import MergeResult, merge
    from mmsplit.verbs.parity import ParityResult, parity
    from mmsplit.verbs.plan import plan
    from mmsplit.verbs.pull import PullResult, pull
    from mmsplit.verbs.push import PushResult, push
    from mmsplit.verbs.repair import RepairResult, repair
    from mmsplit.verbs.repartition import RepartitionResult, repartition
    from mmsplit.verbs.sign import SignResult, sign
    from mmsplit.verbs.split import SplitResult, split
    from mmsplit.verbs.verify import VerifyResult, verify
    from mmsplit.workers import Progress

__version__ = "0.1.0"

_HOMES = {
    "mmsplit.benchmark.bench": ("BenchResult", "bench"),
    "mmsplit.checkpoint": ("Checkpoint", "TensorInfo", "open_checkpoint"),
    "mmsplit.errors": (
        "AccessDeniedError",
        "CheckpointError",
        "FormatError",
        "GgufFileError",
        "HeaderError",
        "IndexMismatchError",
        "IntegrityError",
        "MissingExtraError",
        "MissingPartitionError",
        "MissingShardError",
        "MmsplitError",
        "NetworkError",
        "NoSpaceError",
        "OfflineError",
        "OutputError",
        "OutputExistsError",
        "OutputLockedError",
        "PlanError",
        "RemoteNotFoundError",
        "RequestError",
        "SourceChangedError",
        "TorchFileError",
    ),
    "mmsplit.exporting.parameters_json": ("ExportedLayer", "ExportedPartition"),
    "mmsplit.exporting.parameters_reader": ("load_partition_json",),
    "mmsplit.hub_model": ("HubModel",),
    "mmsplit.layers": ("Layer", "LayerMap", "build_layer_map"),
    "mmsplit.loading.partition": ("Partition",),
    "mmsplit.loading.partition_set": ("PartitionSet",),
    "mmsplit.planning": ("Plan",),
    "mmsplit.remote.source": ("HubOptions", "open_source"),
    "mmsplit.sidecar.scrub_run": ("Scrub",),
    "mmsplit.verbs.download": ("DownloadResult", "download"),
    "mmsplit.verbs.export": ("ExportResult", "export"),
    "mmsplit.verbs.inspect": ("inspect",),
    "mmsplit.verbs.load": ("open_partition", "open_set"),
    "mmsplit.verbs.merge": ("MergeResult", "merge"),
    "mmsplit.verbs.parity": ("ParityResult", "parity"),
    "mmsplit.verbs.plan": ("plan",),
    "mmsplit.verbs.pull": ("PullResult", "pull"),
    "mmsplit.verbs.push": ("PushResult", "push"),
    "mmsplit.verbs.repair": ("RepairResult", "repair"),
    "mmsplit.verbs.repartition": ("RepartitionResult", "repartition"),
    "mmsplit.verbs.sign": ("SignResult", "sign"),
    "mmsplit.verbs.split": ("SplitResult", "split"),
    "mmsplit.verbs.verify": ("VerifyResult", "verify"),
    "mmsplit.workers": ("Progress",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "__version__",
    *sorted(_HOME_OF),
]


def __getattr__(name: str) -> object:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'mmsplit' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
