"""`HubModel`: one model of the Hub at one commit, to download, plan, split and export, also from within an event loop.

Each method makes one call of the verb of its name.  The first that needs the network finds out which commit the
revision stands for, and from then on all speak of that commit, whatever is pushed meanwhile.

Strategy of the async variants.  The verb runs in a thread of its own, so that the loop is never blocked and no other
work of the loop's executor waits behind a download.  A thread cannot be cancelled, but a verb ends when its progress
callback raises: it stops its threads, closes its files and leaves what the same call continues from.  So cancelling
the task makes the next report of progress raise, and `CancelledError` goes on to the caller when the thread has
ended, not before: nobody is left behind who still writes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from mmsplit.checkpoint import IoMode
from mmsplit.codec import CodecName
from mmsplit.errors import OfflineError, RequestError
from mmsplit.exporting.weight_files import DEFAULT_SHARD_BYTES
from mmsplit.in_thread import run_in_thread
from mmsplit.planning import By, NodeRequest, Plan, Rule, SplitBy, TiedMode
from mmsplit.remote.address import HubAddress, parse_hub_address
from mmsplit.remote.hub_cache import HubCache
from mmsplit.remote.remote_file import DEFAULT_CONNECTIONS
from mmsplit.remote.repository import HubRepository, cached_snapshot, hub_endpoint, open_repository
from mmsplit.remote.source import HubOptions
from mmsplit.sidecar.output_directory import Existing
from mmsplit.verbs.download import DownloadResult, download
from mmsplit.verbs.export import DEFAULT_JSON_BYTES, ExportResult, To, export
from mmsplit.verbs.plan import plan
from mmsplit.verbs.split import SplitResult, split
from mmsplit.workers import ProgressCallback


class HubModel:
    """A model of the Hub at one commit; safe to share between threads and tasks.

    `model_id` is `org/name` or `org/name@revision`, never a path.  `revision` is a branch, a tag or a commit.
    `cache_dir` is the Hub cache, where `download` puts files and whence the others take what is there.  `token` False
    sends none.  What is None is found as huggingface_hub finds it.  Nothing is asked of the Hub before it is needed.
    """

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> None:
        self.model_id = model_id
        self.revision = revision
        self.cache_dir = cache_dir
        self._token = token
        self._lock = threading.Lock()
        self._commit: str | None = None
        self._repository: HubRepository | None = None  # None also where only the cache was asked

    def __repr__(self) -> str:
        return f"HubModel({self.model_id!r}, revision={self.revision!r})"  # without the token

    @property
    def repo_id(self) -> str:
        """The repository, `org/name`, without a revision.  Raises `RequestError` for an id that is none."""
        return self._address().repo_id

    @property
    def commit(self) -> str:
        """The commit that all calls speak of, 40 hexadecimal digits; the first use asks the Hub.

        With HF_HUB_OFFLINE it is the one that the cache has of this revision.  Raises `RequestError` for an id that
        is none, `NetworkError`.
        """
        if self._commit is None:
            self._pin()
        assert self._commit is not None
        return self._commit

    def hub_options(self, *, connections: int = DEFAULT_CONNECTIONS, keep_source: bool = False) -> HubOptions:
        """Return what any verb takes as `hub` to speak of this commit.  Raises as `commit` does."""
        return HubOptions(
            revision=self.commit,
            token=self._token,
            cache_dir=self.cache_dir,
            connections=connections,
            keep_source=keep_source,
        )

    def download(
        self,
        *,
        local_dir: str | Path | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        connections: int = DEFAULT_CONNECTIONS,
        verify: bool = False,
        force: bool = False,
        progress: ProgressCallback | None = None,
    ) -> DownloadResult:
        """Download the files that matter into the Hub cache, or into `local_dir`; see `mmsplit.download`."""
        result = download(
            self._source,
            revision=self.commit,
            cache_dir=self.cache_dir if local_dir is None else None,
            local_dir=local_dir,
            token=self._token,
            include=include,
            exclude=exclude,
            connections=connections,
            verify=verify,
            force=force,
            progress=progress,
        )
        if local_dir is None:
            self._name_in_cache()
        return result

    def plan(
        self,
        num_parts: int | None = None,
        *,
        by: By = "bytes",
        weights: Sequence[float | str] | None = None,
        boundaries: Sequence[str] | None = None,
        tied: TiedMode = "duplicate",
        split_by: SplitBy = "layer",
        rule: Rule | None = None,
        nodes: NodeRequest | None = None,
        allow_unknown_dtypes: bool = False,
        connections: int = DEFAULT_CONNECTIONS,
    ) -> Plan:
        """Plan the partitions from headers alone; no weight is fetched.  See `mmsplit.plan`."""
        return plan(
            self._source,
            num_parts,
            by=by,
            weights=weights,
            boundaries=boundaries,
            tied=tied,
            split_by=split_by,
            rule=rule,
            nodes=nodes,
            allow_unknown_dtypes=allow_unknown_dtypes,
            hub=self.hub_options(connections=connections),
        )

    def split(
        self,
        output: str | Path,
        num_parts: int | None = None,
        *,
        by: By = "bytes",
        weights: Sequence[float | str] | None = None,
        boundaries: Sequence[str] | None = None,
        tied: TiedMode = "duplicate",
        split_by: SplitBy = "layer",
        rule: Rule | None = None,
        nodes: NodeRequest | None = None,
        only: Collection[int] | None = None,
        codec: CodecName = "planes",
        threads: int | None = None,
        existing: Existing = "refuse",
        io: IoMode = "auto",
        direct: bool = True,
        source_sha256: bool = True,
        parity: float | None = None,
        allow_unknown_dtypes: bool = False,
        keep_source: bool = False,
        connections: int = DEFAULT_CONNECTIONS,
        progress: ProgressCallback | None = None,
    ) -> SplitResult:
        """Split the model into `output` while it is downloaded, or from the cache if it is there; see `mmsplit.split`.

        With `keep_source` its shards are downloaded to the cache on the way, and kept.
        """
        result = split(
            self._source,
            output,
            num_parts,
            by=by,
            weights=weights,
            boundaries=boundaries,
            tied=tied,
            split_by=split_by,
            rule=rule,
            nodes=nodes,
            only=only,
            codec=codec,
            threads=threads,
            existing=existing,
            io=io,
            direct=direct,
            source_sha256=source_sha256,
            parity=parity,
            allow_unknown_dtypes=allow_unknown_dtypes,
            hub=self.hub_options(connections=connections, keep_source=keep_source),
            progress=progress,
        )
        if keep_source:
            self._name_in_cache()
        return result

    def export(
        self,
        output: str | Path,
        num_parts: int | None = None,
        *,
        part_ids: Collection[int] | None = None,
        to: To = "safetensors",
        by: By = "bytes",
        weights: Sequence[float | str] | None = None,
        boundaries: Sequence[str] | None = None,
        tied: TiedMode = "duplicate",
        split_by: SplitBy = "layer",
        rule: Rule | None = None,
        nodes: NodeRequest | None = None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        max_bytes: int | None = DEFAULT_JSON_BYTES,
        on_estimate: Callable[[int], None] | None = None,
        existing: Existing = "refuse",
        io: IoMode = "auto",
        threads: int | None = None,
        allow_unknown_dtypes: bool = False,
        keep_source: bool = False,
        connections: int = DEFAULT_CONNECTIONS,
        progress: ProgressCallback | None = None,
    ) -> ExportResult:
        """Write partitions, or the whole model, for other programs while it is downloaded; see `mmsplit.export`.

        With `keep_source` its shards are downloaded to the cache on the way, compared with their published SHA-256, and
        kept; ranges alone cannot be.
        """
        result = export(
            self._source,
            output,
            num_parts,
            part_ids=part_ids,
            to=to,
            by=by,
            weights=weights,
            boundaries=boundaries,
            tied=tied,
            split_by=split_by,
            rule=rule,
            nodes=nodes,
            max_shard_bytes=max_shard_bytes,
            max_bytes=max_bytes,
            on_estimate=on_estimate,
            existing=existing,
            io=io,
            threads=threads,
            allow_unknown_dtypes=allow_unknown_dtypes,
            hub=self.hub_options(connections=connections, keep_source=keep_source),
            progress=progress,
        )
        if keep_source:
            self._name_in_cache()
        return result

    async def download_async(
        self,
        *,
        local_dir: str | Path | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        connections: int = DEFAULT_CONNECTIONS,
        verify: bool = False,
        force: bool = False,
        progress: ProgressCallback | None = None,
    ) -> DownloadResult:
        """Do what `download` does without blocking the loop; `progress` is called from other threads.

        Cancelled, it ends when the download has stopped; the same call continues from the byte reached.
        """
        return await run_in_thread(
            lambda report: self.download(
                local_dir=local_dir,
                include=include,
                exclude=exclude,
                connections=connections,
                verify=verify,
                force=force,
                progress=report,
            ),
            progress,
        )

    async def plan_async(
        self,
        num_parts: int | None = None,
        *,
        by: By = "bytes",
        weights: Sequence[float | str] | None = None,
        boundaries: Sequence[str] | None = None,
        tied: TiedMode = "duplicate",
        split_by: SplitBy = "layer",
        rule: Rule | None = None,
        nodes: NodeRequest | None = None,
        allow_unknown_dtypes: bool = False,
        connections: int = DEFAULT_CONNECTIONS,
    ) -> Plan:
        """Do what `plan` does without blocking the loop.

        Cancelled, it ends at once, since nothing is written; requests that are under way end by themselves.
        """
        return await asyncio.to_thread(
            self.plan,
            num_parts,
            by=by,
            weights=weights,
            boundaries=boundaries,
            tied=tied,
            split_by=split_by,
            rule=rule,
            nodes=nodes,
            allow_unknown_dtypes=allow_unknown_dtypes,
            connections=connections,
        )

    async def split_async(
        self,
        output: str | Path,
        num_parts: int | None = None,
        *,
        by: By = "bytes",
        weights: Sequence[float | str] | None = None,
        boundaries: Sequence[str] | None = None,
        tied: TiedMode = "duplicate",
        split_by: SplitBy = "layer",
        rule: Rule | None = None,
        nodes: NodeRequest | None = None,
        only: Collection[int] | None = None,
        codec: CodecName = "planes",
        threads: int | None = None,
        existing: Existing = "refuse",
        io: IoMode = "auto",
        direct: bool = True,
        source_sha256: bool = True,
        parity: float | None = None,
        allow_unknown_dtypes: bool = False,
        keep_source: bool = False,
        connections: int = DEFAULT_CONNECTIONS,
        progress: ProgressCallback | None = None,
    ) -> SplitResult:
        """Do what `split` does without blocking the loop; `progress` is called from other threads.

        Cancelled, it ends when the split has stopped; with `existing="resume"` the same call goes on.
        """
        return await run_in_thread(
            lambda report: self.split(
                output,
                num_parts,
                by=by,
                weights=weights,
                boundaries=boundaries,
                tied=tied,
                split_by=split_by,
                rule=rule,
                nodes=nodes,
                only=only,
                codec=codec,
                threads=threads,
                existing=existing,
                io=io,
                direct=direct,
                source_sha256=source_sha256,
                parity=parity,
                allow_unknown_dtypes=allow_unknown_dtypes,
                keep_source=keep_source,
                connections=connections,
                progress=report,
            ),
            progress,
        )

    async def export_async(
        self,
        output: str | Path,
        num_parts: int | None = None,
        *,
        part_ids: Collection[int] | None = None,
        to: To = "safetensors",
        by: By = "bytes",
        weights: Sequence[float | str] | None = None,
        boundaries: Sequence[str] | None = None,
        tied: TiedMode = "duplicate",
        split_by: SplitBy = "layer",
        rule: Rule | None = None,
        nodes: NodeRequest | None = None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        max_bytes: int | None = DEFAULT_JSON_BYTES,
        on_estimate: Callable[[int], None] | None = None,
        existing: Existing = "refuse",
        io: IoMode = "auto",
        threads: int | None = None,
        allow_unknown_dtypes: bool = False,
        keep_source: bool = False,
        connections: int = DEFAULT_CONNECTIONS,
        progress: ProgressCallback | None = None,
    ) -> ExportResult:
        """Do what `export` does without blocking the loop; `progress` is called from other threads.

        Cancelled, it ends when the export has stopped; with `existing="resume"` the same call goes on.
        """
        return await run_in_thread(
            lambda report: self.export(
                output,
                num_parts,
                part_ids=part_ids,
                to=to,
                by=by,
                weights=weights,
                boundaries=boundaries,
                tied=tied,
                split_by=split_by,
                rule=rule,
                nodes=nodes,
                max_shard_bytes=max_shard_bytes,
                max_bytes=max_bytes,
                on_estimate=on_estimate,
                existing=existing,
                io=io,
                threads=threads,
                allow_unknown_dtypes=allow_unknown_dtypes,
                keep_source=keep_source,
                connections=connections,
                progress=report,
            ),
            progress,
        )

    @property
    def _source(self) -> str:
        """The model as verbs take it, written so that it is never taken for a path of the same name."""
        return f"hf://{self.repo_id}"

    def _address(self) -> HubAddress:
        address = parse_hub_address(self.model_id, hub_endpoint())
        if address is None:
            raise RequestError(
                "not a model of the Hub", found=repr(self.model_id), hint="Give org/name or org/name@revision."
            )
        if self.revision is not None and address.revision not in (None, self.revision):
            raise RequestError("two revisions are asked for", found=f"{address.revision} and {self.revision}")
        return address._replace(revision=self.revision or address.revision)

    def _name_in_cache(self) -> None:
        """Let the cache know the commit by the branch or tag that was asked for: the verbs were given the commit."""
        if self._repository is not None:
            HubCache(self._repository, self.cache_dir).finish(self._repository.revision)

    def _pin(self) -> None:
        """Find the commit.  Threads that do so at once may both ask; the first answer is everybody's."""
        address = self._address()
        repository: HubRepository | None = None
        try:
            repository = open_repository(address.repo_id, address.revision, self._token)
            commit = repository.commit
        except OfflineError:
            snapshot = cached_snapshot(address.repo_id, address.revision, self.cache_dir)
            if snapshot is None:
                raise
            commit = snapshot.name
        with self._lock:
            if self._commit is None:
                self._repository, self._commit = repository, commit
