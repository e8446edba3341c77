"""`HubModel`: every call speaks of one commit; the loop is never blocked; a cancelled task leaves nobody who writes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, llama_weights, tree, write_checkpoint
from huggingface_hub import constants, snapshot_download
from loopback_fixtures import use_endpoint
from loopback_hub import MEMBER_TOKEN, Fault, LoopbackHub

import mmsplit
from mmsplit import HubModel, Progress
from mmsplit.errors import NetworkError, OfflineError, RequestError
from mmsplit.workers import ProgressCallback

ID = "org/model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """About 8 MB in two shards."""
    weights = llama_weights(4, rows=1000, columns=200)
    half = len(weights) // 2
    files = {"config.json": CAUSAL_CONFIG, "tokenizer.json": b'{"version": 1}'}
    return write_checkpoint(tmp_path / "hub" / ID, [weights[:half], weights[half:]], index=True, files=files)


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub(model.parent.parent) as hub:
        use_endpoint(monkeypatch, hub.endpoint)
        yield hub


@pytest.fixture
def commit(hub: LoopbackHub) -> str:
    return hub.repositories[ID].branches["main"]


@pytest.fixture
def expected(model: Path, commit: str, tmp_path: Path) -> dict[str, bytes]:
    """What a split of the local files makes, told of which model they are."""
    mmsplit.split(model, tmp_path / "local", 2, model_id=ID, revision=commit)
    return tree(tmp_path / "local")


def stop_at_first_report(task: asyncio.Task[object], loop: asyncio.AbstractEventLoop) -> ProgressCallback:
    """Return a progress callback that has `task` cancelled while the work waits in its first report."""
    cancelled = threading.Event()

    def cancel() -> None:
        task.cancel()
        loop.call_soon(cancelled.set)  # when the task has been told

    def report(progress: Progress) -> None:
        if not cancelled.is_set():
            loop.call_soon_threadsafe(cancel)
            assert cancelled.wait(30)

    return report


#: What a method need not take: it says itself, or has said when it was made, or a model of the Hub has not.
NOT_OF_A_HUB_MODEL = {
    "plan": {"source", "hub"},
    "split": {"source", "hub", "model_id", "revision", "consume", "announce"},
    "export": {"source", "hub", "root_digest"},
    "download": {"model_id", "revision", "cache_dir", "token", "endpoint"},
}


@pytest.mark.parametrize("verb", NOT_OF_A_HUB_MODEL)
def test_a_method_takes_what_the_verb_takes(verb: str) -> None:
    """And its async variant as well, with the same defaults; the connections are an option of their own."""
    method = dict(signature(getattr(HubModel, verb)).parameters)
    function = dict(signature(getattr(mmsplit, verb)).parameters)
    variant = dict(signature(getattr(HubModel, f"{verb}_async")).parameters)
    assert method == variant
    assert set(function) - set(method) == NOT_OF_A_HUB_MODEL[verb]
    assert set(method) - set(function) <= {"self", "connections", "keep_source"}
    assert all(method[name].default == function[name].default for name in set(method) & set(function))


def test_nothing_is_asked_before_it_is_needed(hub: LoopbackHub, commit: str) -> None:
    """And the commit once."""
    model = HubModel(ID)
    assert hub.requests == []
    assert (model.commit, model.repo_id) == (commit, ID)
    asked = len(hub.requests)
    assert model.hub_options().revision == commit
    assert len(hub.requests) == asked


def test_all_calls_speak_of_one_commit(
    hub: LoopbackHub, commit: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Whatever is pushed between them."""
    model = HubModel(ID, cache_dir=tmp_path / "cache")
    plan = model.plan(2)
    hub.move_main(ID, {"README.md": b"news"})
    result = model.split(tmp_path / "out", 2)
    assert tree(tmp_path / "out") == expected
    assert [part.total_bytes for part in plan.partitions] == [entry.total_bytes for entry in result.partitions]
    assert model.download().commit == commit


def test_what_is_downloaded_is_found_by_its_branch(hub: LoopbackHub, commit: str, tmp_path: Path) -> None:
    """huggingface_hub finds it in the cache by the name it was asked as, and so does a split, which moves nothing."""
    cache = tmp_path / "cache"
    model = HubModel(ID, cache_dir=cache)
    path = model.download().path
    assert Path(snapshot_download(ID, cache_dir=cache, local_files_only=True)) == path
    result = model.split(tmp_path / "out", 2)
    assert result.moved_bytes is None
    assert result.manifest is not None
    assert (result.manifest.model_id, result.manifest.revision) == (ID, commit)


def test_works_offline_with_what_is_in_the_cache(
    hub: LoopbackHub, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With HF_HUB_OFFLINE the commit is the one that the cache has; without a copy there, the error says so."""
    cache = tmp_path / "cache"
    HubModel(ID, cache_dir=cache).download()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.clear()
    model = HubModel(ID, cache_dir=cache)
    assert model.commit == commit
    model.split(tmp_path / "out", 2)
    assert hub.requests == []
    with pytest.raises(OfflineError):
        _ = HubModel(ID, cache_dir=tmp_path / "empty").commit


def test_keep_source_leaves_the_shards_in_the_cache(
    hub: LoopbackHub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The set is the same, and the shards are those of the Hub."""
    there = HubModel(ID, cache_dir=tmp_path / "cache")
    there.split(tmp_path / "out", 2, keep_source=True)
    assert tree(tmp_path / "out") == expected
    snapshot = tmp_path / "cache" / "models--org--model" / "snapshots" / there.commit
    for shard in model.glob("*.safetensors"):
        assert (snapshot / shard.name).read_bytes() == shard.read_bytes()


def test_a_directory_of_the_same_name_is_not_taken_for_the_model(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id given to HubModel is never a path."""
    (tmp_path / "here" / ID).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert HubModel(ID).plan(2).num_parts == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (HubModel("./model"), "not a model of the Hub"),
        (HubModel("model"), "not a model of the Hub"),
        (HubModel(f"{ID}@v1", "v2"), "two revisions"),
    ],
    ids=["path", "no namespace", "two revisions"],
)
def test_what_is_no_model_is_refused(hub: LoopbackHub, wrong: HubModel, message: str) -> None:
    """Before anything is asked."""
    with pytest.raises(RequestError, match=message):
        wrong.plan(2)
    assert hub.requests == []


def test_the_token_is_not_shown(hub: LoopbackHub) -> None:
    """But sent."""
    model = HubModel(ID, token=MEMBER_TOKEN)
    assert MEMBER_TOKEN not in repr(model)
    assert model.commit
    assert {request.authorization for request in hub.requests} == {f"Bearer {MEMBER_TOKEN}"}


def test_a_failure_to_find_the_commit_is_not_remembered(hub: LoopbackHub, commit: str) -> None:
    """The next use asks again."""
    model = HubModel(ID)
    hub.faults.append(Fault("status", match="hub GET *", status=404))
    with pytest.raises(NetworkError):
        _ = model.commit
    assert model.commit == commit


@pytest.mark.parametrize("keep_source", [False, True])
def test_export_is_that_of_the_files(hub: LoopbackHub, model: Path, tmp_path: Path, keep_source: bool) -> None:
    """Of the pinned commit, whatever is pushed; also from within a loop."""
    there = HubModel(ID, cache_dir=tmp_path / "cache")
    assert there.commit
    hub.move_main(ID, {"README.md": b"news"})
    arguments = {"part_ids": [1], "max_shard_bytes": 10**6}
    mmsplit.export(model, tmp_path / "local", 2, **arguments)
    there.export(tmp_path / "a", 2, keep_source=keep_source, **arguments)
    asyncio.run(there.export_async(tmp_path / "b", 2, keep_source=keep_source, **arguments))
    weights = {name: data for name, data in tree(tmp_path / "local").items() if name != "mmsplit_export.json"}
    for out in ("a", "b"):
        assert {name: data for name, data in tree(tmp_path / out).items() if name in weights} == weights


def test_async_variants_give_the_same(hub: LoopbackHub, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Several at once, from one object."""

    async def run() -> None:
        model = HubModel(ID, cache_dir=tmp_path / "cache")
        plan, result = await asyncio.gather(model.plan_async(2), model.split_async(tmp_path / "out", 2))
        assert plan.num_parts == len(result.partitions) == 2
        assert (await model.download_async()).commit == model.commit

    asyncio.run(run())
    assert tree(tmp_path / "out") == expected


def test_the_loop_is_not_blocked(hub: LoopbackHub, tmp_path: Path) -> None:
    """Work that waits until the loop has done something gets on."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        ran = threading.Event()

        def report(progress: Progress) -> None:
            loop.call_soon_threadsafe(ran.set)
            assert ran.wait(30), "the loop stands still"

        model = HubModel(ID, cache_dir=tmp_path / "cache")
        await model.download_async(progress=report)
        ran.clear()
        await model.split_async(tmp_path / "out", 2, progress=report)

    asyncio.run(run())


def test_errors_come_through(hub: LoopbackHub, tmp_path: Path) -> None:
    """Those of the verb and those of a caller's callback."""

    def fail(progress: Progress) -> None:
        raise ZeroDivisionError

    async def run() -> None:
        with pytest.raises(mmsplit.PlanError):
            await HubModel(ID).split_async(tmp_path / "out", 1000)
        with pytest.raises(ZeroDivisionError):
            await HubModel(ID).split_async(tmp_path / "out", 2, progress=fail)

    asyncio.run(run())


@pytest.mark.parametrize("verb", ["download", "split"])
def test_a_cancelled_task_leaves_nobody_behind(
    hub: LoopbackHub, expected: dict[str, bytes], tmp_path: Path, verb: str
) -> None:
    """When CancelledError arrives all threads have ended, and the same call goes on from there."""
    model = HubModel(ID, cache_dir=tmp_path / "cache")

    async def work(progress: ProgressCallback | None) -> object:
        if verb == "download":
            return await model.download_async(progress=progress, connections=1)
        return await model.split_async(tmp_path / "out", 2, existing="resume", progress=progress)

    async def cancel_it() -> None:
        loop = asyncio.get_running_loop()
        ours: asyncio.Future[asyncio.Task[object]] = loop.create_future()

        async def body() -> object:
            return await work(stop_at_first_report(await ours, loop))

        task = asyncio.create_task(body())
        ours.set_result(task)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("mmsplit-")] == []

    asyncio.run(cancel_it())
    assert not (tmp_path / "out" / "partition_set.json").exists()
    asyncio.run(work(None))
    if verb == "split":
        assert tree(tmp_path / "out") == expected


def test_cancelling_twice_does_not_overtake_the_thread(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is impatient waits for the work to end, too."""
    ended = threading.Event()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        inside, release = threading.Event(), threading.Event()

        def report(progress: Progress) -> None:
            inside.set()
            assert release.wait(30)

        def split_and_say(*arguments: object, **options: object) -> None:
            try:
                real(*arguments, **options)  # type: ignore[arg-type]
            finally:
                ended.set()

        monkeypatch.setattr("mmsplit.hub_model.split", split_and_say)
        task = asyncio.create_task(HubModel(ID).split_async(tmp_path / "out", 2, progress=report))
        assert await asyncio.to_thread(inside.wait, 30)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
        loop.call_soon(release.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    real = mmsplit.split
    asyncio.run(run())


def test_a_cancelled_plan_ends_at_once(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written, so that nobody has to wait for the Hub's answer."""
    asked, release = threading.Event(), threading.Event()

    def slow_plan(*arguments: object, **options: object) -> None:
        asked.set()
        assert release.wait(30)

    monkeypatch.setattr("mmsplit.hub_model.plan", slow_plan)

    async def run() -> None:
        task = asyncio.create_task(HubModel(ID).plan_async(2))
        assert await asyncio.to_thread(asked.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not release.is_set()
        release.set()

    asyncio.run(run())
