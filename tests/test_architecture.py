"""The house: imports point down only, verbs do not know each other, only the CLI prints."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mmsplit"

#: Rooms from the top down.  A module may import from rooms above its own; within a room, from files listed earlier.
HOUSE = {
    "foundation": ["errors", "digests", "durable", "regular_files", "dtypes", "workers", "in_thread", "queues"],
    "checkpoint": [
        "tensor",
        "header",
        "header_writer",
        "weights_index",
        "cover",
        "range_reads",
        "strided",
        "pickle_layout",
        "torch_objects",
        "state_dict",
        "torch_zip",
        "torch_legacy",
        "torch_file",
        "torch_tensors",
        "weight_files",
        "gguf_types",
        "gguf_values",
        "gguf_file",
        "gguf_config",
        "file_system",
        "file_reader",
        "prefetcher",
        "storage",
        "shard_layout",
        "reader_pool",
        "local_storage",
        "read_ahead",
        "directory",
        "checkpoint",
        "kept_storage",
        "shard_hasher",
    ],
    "remote": [
        "address",
        "redaction",
        "transfer_log",
        "remote_file",
        "local_file",
        "patience",
        "failures",
        "http_client",
        "http_file",
        "fsspec_file",
        "open_url",
        "repository",
        "range_fetcher",
        "small_ranges",
        "disk",
        "content_hash",
        "hub_storage",
        "file_download",
        "hub_cache",
        "downloader",
        "choose_files",
        "cached_storage",
        "source",
        "set_source",
        "push_target",
    ],
    "layers": ["layer", "rules", "naming", "stacks", "ordering", "crosscheck", "build", "experts", "kinds"],
    "planning": [
        "assignment",
        "ties",
        "toml_fields",
        "nodes",
        "model_config",
        "attention_windows",
        "kv_cache",
        "training_state",
        "memory_needs",
        "placement",
        "rows",
        "plan",
        "companions",
        "units",
        "planner",
        "sublayers",
        "type_cut",
        "expert_map",
        "expert_cut",
        "rule_cut",
        "cuts",
        "node_problem",
        "misfit",
        "node_planner",
        "lookalikes",
    ],
    "codec": ["word", "chunk_codec", "extent", "erasure"],
    "sidecar": [
        "file_names",
        "layout",
        "framing",
        "chunk_index",
        "json_fields",
        "manifest",
        "slices",
        "manifest_builder",
        "payload_tail",
        "set_manifest",
        "output_files",
        "part_ids",
        "partition_reader",
        "pace",
        "parity_layout",
        "parity_stripes",
        "parity_file",
        "chunk_check",
        "chunk_loader",
        "block_sharing",
        "payload_file",
        "payload_writer",
        "repeated_chunks",
        "chunk_copier",
        "slot_encoder",
        "small_files",
        "disk_forecast",
        "consumed_directory",
        "output_directory",
        "parity_writer",
        "set_reader",
        "single_partitions",
        "signature",
        "payload_pieces",
        "partition_check",
        "piece_fetcher",
        "partition_receiver",
        "receiving_directory",
        "set_card",
        "shard_pieces",
        "shard_writer",
        "scrub",
        "scrub_history",
        "scrub_run",
    ],
    "merging": ["set_consumer", "span", "lane", "lanes"],
    "exporting": [
        "tensor",
        "elements",
        "float32",
        "set_source",
        "checkpoint_source",
        "weight_files",
        "parameters_json",
        "parameters_reader",
        "parameters_writer",
        "export_form",
        "export_record",
        "export_run",
    ],
    "loading": ["arrays", "partition", "partition_set"],
    "splitting": [
        "equal_tensors",
        "source_set",
        "split_result",
        "parity_of_split",
        "partition_run",
        "slot_jobs",
        "stored_shards",
        "same_weights",
        "same_source",
        "consumption",
        "kept_journal",
        "consumer",
        "space",
        "split_run",
    ],
    "repartitioning": ["chunk_places", "stored_set", "set_readers", "set_storage", "set_chunks"],
    "repairing": [
        "ledger",
        "sources",
        "siblings",
        "planned_partition",
        "index_recovery",
        "manifest_finder",
        "structure",
        "chunk_mender",
        "payload_rebuild",
        "parity_copy",
        "partition_repair",
        "parity_upkeep",
        "set_files",
    ],
    "verbs": [
        "plan",
        "split",
        "verify",
        "merge",
        "load",
        "inspect",
        "export",
        "download",
        "pull",
        "push",
        "repair",
        "repartition",
        "parity",
        "sign",
    ],
    "hub_model": [],
    "synthetic": [],
    "benchmark": ["rates", "sample", "bench"],
    "cli": [
        "options",
        "source_options",
        "progress",
        "render",
        "node_options",
        "scrub_options",
        "consume_option",
        "inspect_command",
        "plan_command",
        "download_command",
        "pull_command",
        "push_command",
        "split_command",
        "verify_command",
        "repair_command",
        "repartition_command",
        "parity_command",
        "merge_command",
        "sign_command",
        "export_command",
        "bench_command",
        "app",
    ],
}
PURE_ROOMS = ("layers", "planning", "codec")
PURE_FILES = (
    "checkpoint.header",
    "checkpoint.weights_index",
    "remote.address",
    "remote.redaction",
    "sidecar.layout",
    "sidecar.framing",
    "sidecar.manifest",
    "sidecar.set_manifest",
    "sidecar.json_fields",
    "sidecar.chunk_index",
    "sidecar.manifest_builder",
    "sidecar.slices",
    "sidecar.repeated_chunks",
    "sidecar.payload_pieces",
    "sidecar.payload_tail",
    "sidecar.set_card",
    "repartitioning.chunk_places",
    "sidecar.scrub",
    "sidecar.parity_layout",
    "sidecar.disk_forecast",
    "splitting.consumption",
    "repairing.planned_partition",
    "exporting.weight_files",
    "exporting.parameters_json",
    "exporting.float32",
)


def _modules() -> dict[str, Path]:
    """Every module by its name inside the package: `checkpoint.header`; a package's __init__ by the package's."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if path.name == "__main__.py":
            continue
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def _room_of(module: str) -> str:
    return "foundation" if module in HOUSE["foundation"] else module.split(".")[0]


def _imports(path: Path) -> list[str]:
    """Names inside the package that a file imports, those only for type checkers left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mmsplit":
            found.append(node.module.removeprefix("mmsplit").lstrip("."))
        elif isinstance(node, ast.Import):
            found += [a.name.removeprefix("mmsplit.") for a in node.names if a.name.startswith("mmsplit.")]
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: imports are absolute"
    return found


MODULES = _modules()


def test_every_module_has_its_place_in_the_house() -> None:
    """A new file is listed above, where its place can be argued about; nothing listed is gone."""
    files = {module for module, path in MODULES.items() if path.name != "__init__.py"}
    listed = {f"{room}.{name}" if room != "foundation" else name for room, names in HOUSE.items() for name in names} | {
        room for room, names in HOUSE.items() if not names
    }
    assert files == listed


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down_only(module: str) -> None:
    """A module imports from rooms above its own, and within its room from files that stand earlier."""
    if module == "":
        assert _imports(MODULES[module]) == []  # the package itself imports nothing until it is asked
        return
    rooms = list(HOUSE)
    room = _room_of(module)
    for imported in _imports(MODULES[module]):
        if imported == "":
            continue  # the package's own version
        other = _room_of(imported)
        assert rooms.index(other) <= rooms.index(room), f"{module} imports {imported}, which stands below it"
        if other == room and MODULES[module].name != "__init__.py":
            assert room != "verbs", f"{module} imports another verb, {imported}"
            order = HOUSE[room]
            own, its = module.split(".")[-1], imported.split(".")[-1]
            assert its in order, f"{module} imports its own room's front door, {imported}"
            assert order.index(its) < order.index(own), f"{module} imports {imported}, which stands after it"


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if m.split(".")[0] in PURE_ROOMS or m in PURE_FILES])
def test_pure_modules_do_no_io(module: str) -> None:
    """Pure rooms and files neither open files nor map memory nor look at the system."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {"os", "io", "mmap", "shutil", "socket", "subprocess", "pathlib"} & {n.split(".")[0] for n in names}
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open")


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if m.split(".")[0] != "cli"])
def test_only_the_cli_prints(module: str) -> None:
    """Nothing but the CLI writes to a standard stream."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        assert not (isinstance(node, ast.Name) and node.id == "print")
        assert not (isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr"))


def test_one_place_reads_whole_files() -> None:
    """Whoever reads a file of a name may meet a FIFO or /dev/zero there, but not who asks for a regular one."""
    assert [m for m, path in MODULES.items() if ".read_bytes()" in path.read_text()] == []


def test_one_place_maps_memory() -> None:
    """Only the file reader imports mmap."""
    users = [m for m, path in MODULES.items() if "import mmap\n" in path.read_text()]
    assert users == ["checkpoint.file_reader"]
