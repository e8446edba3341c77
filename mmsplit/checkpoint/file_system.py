"""What kind of file system a file lies on, as far as that decides how it is read."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Final

#: f_type of statfs(2) (<linux/magic.h> and the file systems' own headers) where another machine, or a process of
#: somebody's, has the last word on a file: a lease that this kernel grants does not bind them.
_NETWORK: Final = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x65735546: "fuse",
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x5346414F: "afs",
    0x6B414653: "kafs",
    0x73757245: "coda",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x20030528: "orangefs",
    0xAAD7AAEA: "panfs",
    0x786F4256: "vboxsf",
    0xBACBACBC: "vmhgfs",
    0x01161970: "gfs2",
    0x7461636F: "ocfs2",
}
_STATFS_ROOM: Final = 512


def is_network_file_system(fd: int) -> bool:
    """Whether others than this kernel can change an open file under its map; False where that cannot be told."""
    return file_system_type(fd) in _NETWORK


def file_system_type(fd: int) -> int | None:
    """Return f_type of statfs(2), unsigned; None where there is no such thing."""
    if not sys.platform.startswith("linux"):
        return None
    found = ctypes.create_string_buffer(_STATFS_ROOM)
    if _libc().fstatfs(fd, found) != 0:
        return None
    first = found.raw[: ctypes.sizeof(ctypes.c_long)]  # f_type, as a long of the machine
    return int.from_bytes(first, sys.byteorder) & 0xFFFFFFFF


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
    libc.fstatfs.restype = ctypes.c_int
    return libc
