"""A file at any address: HTTP by our own means, anything else by fsspec."""

from __future__ import annotations

from mmsplit.remote.fsspec_file import FsspecFile
from mmsplit.remote.http_client import HttpClient
from mmsplit.remote.http_file import HttpFile
from mmsplit.remote.patience import Clock, Limits
from mmsplit.remote.remote_file import RemoteFile
from mmsplit.remote.transfer_log import Traffic


class UrlFiles:
    """Opens files by address; all of them share one `Traffic`.  No token is ever sent."""

    def __init__(
        self, *, traffic: Traffic | None = None, limits: Limits | None = None, clock: Clock | None = None
    ) -> None:
        self.traffic = traffic or Traffic()
        self._limits = limits
        self._clock = clock
        self._client = HttpClient(traffic=self.traffic, limits=limits, clock=clock)

    def open(self, url: str, name: str | None = None) -> RemoteFile:
        """Return the file at `url`; `name` is what it is called, by default the last part of the address.

        Raises `RequestError` for what is no address, `MissingExtraError` for a protocol whose fsspec package is not
        installed, and `NetworkError` where fsspec finds no such file; HTTP is not asked before the first range.
        """
        if url.partition("://")[0].lower() in ("http", "https"):
            return HttpFile(self._client, url, name=name)
        return FsspecFile(url, name=name, traffic=self.traffic, limits=self._limits, clock=self._clock)
