"""Files that are written atomically, JSON, checksums, locks, and checks of paths."""

import contextlib
import errno
import functools
import json
import os
import stat
import sys
import zlib
from pathlib import Path

from runtime.errors import RunError, UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks: two runs in one folder are then not noticed
    fcntl = None


MISSING = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}  # the file system lacks the call
# Error numbers that tell of a file itself, and None of a reader's own errors; others are of the system
OF_THE_FILE = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENAMETOOLONG}


def replace_file(path, write):
    """Write a file atomically: write(file) fills a temporary file beside `path`, which is flushed to the disk and only then
    renamed. Where this raises, what write() raises or an OSError, `path` is what it was."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
            write(file)
        # safetensors 0.8 puts a file of its own in this one's place, which its owner alone may read
        with open(temporary, "rb+") as file:
            if os.fstat(file.fileno()).st_mode != mode:
                os.chmod(temporary, stat.S_IMODE(mode))
            with do_without(f"{path.parent}: its file system cannot flush files to the disk"):
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the error under way is the one to report
            temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and (found := of_system(error)):
            raise found from None  # torch's archive writer turns a full disk into a RuntimeError of its own
        raise
    if os.name == "posix":  # the new name has to reach the disk too; the file is complete whether it does or not
        try:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:  # SMB and FUSE lack the call
            warn_once(f"{path.parent}: a power failure may undo what was written last ({reason(error)})")


@functools.cache
def warn_once(text):
    print(f"Warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def do_without(consequence):
    """Go on, with a line of warning, where a file system lacks the call of the block: some network file systems do."""
    try:
        yield
    except OSError as error:
        if error.errno not in MISSING:
            raise
        warn_once(f"{consequence} ({reason(error)})")


def _temporary(path):
    return path.with_name(f".{path.name}.{os.getpid()}.dit.tmp")


def remove_leftovers(folder, name="*"):
    """Delete the temporary files that killed writes of files called `name` have left in `folder`."""
    for path in Path(folder).glob(f".{name}.*.dit.tmp"):
        with contextlib.suppress(OSError):  # a folder of that name, or already gone
            path.unlink()


def of_system(error):
    """The error of the system behind an error, or None."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def reason(error):
    """Why a file could not be read or written, in a few words."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


@contextlib.contextmanager
def write_errors(what, consequence=""):
    """Raise an OSError of the block as one line: "{what}: cannot be written (No space left on device){consequence}"."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{what}: cannot be written ({reason(error)}){consequence}") from None


def write_json(path, value):
    """Write a value as JSON, atomically. Raises OSError."""
    replace_file(path, lambda file: file.write(f"{json.dumps(value, indent=2, default=str)}\n".encode()))


def read_json(path, kind=dict):
    """The value in a JSON file; None where it is missing, damaged or no `kind`. Raises RunError where it is unreadable."""
    try:
        check_regular(path)
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise RunError(path, f"cannot be read ({reason(error)})", "run again when it can be read") from None
        return None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, kind) else None


def check_regular(path):
    """Raises OSError unless `path` is a regular file: a named pipe, say, would be waited for, and a device overwritten."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, f"{Path(path).name} is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"{Path(path).name} is not a regular file")


def checksum(path):
    """CRC-32 of a file's bytes, as eight hexadecimal digits."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def checksum_of_arrays(arrays):
    """CRC-32 of the names and values of {name: contiguous array}, as eight hexadecimal digits."""
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name], zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def checksum_of_text(lines):
    """CRC-32 of lines of text, as eight hexadecimal digits."""
    return f"{zlib.crc32(chr(10).join(lines).encode(errors='surrogateescape')):08x}"


def check_input(path, option, kind):
    """Raises UserError, which names the option, unless `path` is a "file" or a "folder", as `kind` says, that exists."""
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        link = " (a link to what does not exist)" if os.path.islink(path) else ""
        raise UserError(f"{option} {path}", f"no such {kind}{link}", f"check the path {os.path.abspath(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}", f"cannot be read ({reason(error)})", f"name another {kind}") from None
    if is_folder != (kind == "folder"):
        raise UserError(f"{option} {path}", f"is a {'folder' if is_folder else 'file'}", f"name a {kind}")


def check_output(path, option):
    """Refuse, before any work, an output file that could not be written: a folder or special file, or a file in a folder
    that is missing or not writable. Raises UserError that names the option."""
    path, where = Path(path), f"{option} {path}"
    if os.path.isdir(path):
        raise UserError(where, "is a folder", "name a file")
    folder = path.absolute().parent
    if not os.path.isdir(folder):
        raise UserError(where, "its folder does not exist", f"make {folder}, or name another file")
    try:
        with contextlib.suppress(FileNotFoundError):
            check_regular(path)
        if not os.access(folder, os.W_OK) or (os.path.exists(path) and not os.access(path, os.W_OK)):
            raise PermissionError(errno.EACCES, "permission denied")
        temporary = _temporary(path)
        temporary.open("wb").close()
        temporary.unlink()
    except OSError as error:
        raise UserError(where, f"cannot be written to ({reason(error)})", "name another file") from None


def lock_folder(folder):
    """Make `folder` if need be and lock it for this process, until the returned file is closed or the process ends. Data
    workers do not inherit the lock. Raises UserError where another process holds it or the folder cannot be written to."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            check_regular(folder / ".lock")
        lock = open(folder / ".lock", "a")  # noqa: SIM115 -- the caller's to close
        if fcntl:
            with do_without(f"{folder}: its file system has no locks; start no second command that writes there"):
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_leftovers(folder)
        return lock
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN) and (folder / ".lock").exists() and os.access(folder, os.W_OK):
            raise UserError(folder, "another run is writing here", "wait for it, or choose another folder") from None
        why = "it is not a folder" if isinstance(error, FileExistsError) else reason(error)
        raise UserError(folder, f"cannot be written to ({why})", "choose another folder") from None


def unwritable(path, error):
    """The error of a run whose records cannot be written."""
    return RunError(f"{path}: cannot be written to ({reason(error)}); checkpoints are untouched")
