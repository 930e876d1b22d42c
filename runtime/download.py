"""Downloads that resume where they broke off, are checked, and are made once however many processes ask for the file."""

import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tqdm.auto import tqdm

from runtime.errors import UserError
from runtime.files import do_without, fcntl

TIMEOUT = 60  # seconds without a byte


class DownloadError(UserError):
    """A file that could not be downloaded. The message is one line with the address, what is wrong and the way out."""


def fetch(url, path, check=None):
    """`path` as a Path, after downloading it from `url` if there is no such file yet.

    check(file): raises ValueError, or a UserError, if the downloaded file is not the wanted one; it is called before the
    file gets its name. A download that breaks off stays as `{path}.part` and the next call resumes it. Any number of
    processes may call this at once: one downloads, the others wait. Raises DownloadError."""
    path = Path(path)
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.part")
    by_hand = f"or download it by hand from {url} to {path}"
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            lock(file)
            if path.exists():  # another process was faster; if there is a `part`, our open() has made it, and it is empty
                part.unlink(missing_ok=True)
                return path
            resume(url, file)
            try:
                if check:
                    check(part)
            except ValueError as error:
                file.truncate(0)  # the file is not removed because others may be waiting for the lock on it
                problem = f"the downloaded file is unusable: {error}"
                raise DownloadError(url, problem, f"run again to download it anew, {by_hand}") from None
            if not fcntl:
                file.close()  # Windows does not rename open files
            os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:  # of the network or of the disk
        raise DownloadError(url, f"download failed: {error}", f"run again to resume it, {by_hand}") from None
    return path


def lock(file):
    """Wait until no other process has `file` locked, and lock it until it is closed or this process ends."""
    if not fcntl:
        return
    with do_without(f"{file.name}: its file system has no locks; start no second download of it"):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{file.name}: waiting for another process that is downloading it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)


def resume(url, file):
    """Download the rest of `url` into `file`, which is open for appending; all of it where the server cannot resume.
    Raises OSError (urllib's errors are OSErrors) or http.client.HTTPException."""
    start = max(0, file.seek(0, os.SEEK_END) - 1)  # the last byte again: servers refuse a range that begins at the end
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: `file` is longer than what the server has
            raise
        response = urllib.request.urlopen(url, timeout=TIMEOUT)
    with response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None
        file.truncate(start)
        progress = {"desc": url.rpartition("/")[2], "total": total, "initial": start}
        with tqdm.wrapattr(response, "read", **progress) as stream:
            shutil.copyfileobj(stream, file, 1 << 20)
    file.flush()
    os.fsync(file.fileno())
    size = os.fstat(file.fileno()).st_size
    if total is not None and size != total:
        raise OSError(f"the connection broke off after {size:,} of {total:,} bytes")
