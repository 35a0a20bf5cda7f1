"""A temporary folder that does not outlive its process for long.

It goes when the process ends. After `kill -9` it stays until the next process makes a folder with
the same prefix. Who is alive is told by a lock on a file in it, which the system gives up with
the process and its forks. Process ids would mean nothing to other containers that share the disk.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

LOCK = "owner.lock"


class OwnFolder:
    """A folder of this process, beside which those of dead ones are removed."""

    def __init__(self, prefix: str) -> None:
        """Make it in the system's temporary folder.

        Raises:
            OSError: there is no room, or no right to write there.
        """
        self._folder = tempfile.TemporaryDirectory(prefix=prefix)
        self.name = self._folder.name
        _remove_left_behind(prefix)
        with contextlib.suppress(OSError):  # a disk without locks: nobody will remove the folder
            # Others look for the lock's final name, and so never find it unlocked.
            unlocked = os.path.join(self.name, "new.lock")
            self._lock = open(unlocked, "xb")  # noqa: SIM115  (held until the process ends)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.rename(unlocked, os.path.join(self.name, LOCK))


def _remove_left_behind(prefix: str) -> None:
    """Remove folders of this user whose lock nobody holds."""
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*/{LOCK}"):
        with contextlib.suppress(OSError), lock.open("rb") as file:
            if lock.parent.lstat().st_uid == os.geteuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
