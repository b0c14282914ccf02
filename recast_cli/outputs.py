"""Writing results: all or nothing, and never over an input."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from recast_cli.errors import ArtifactError, EnvironmentFault, RecastError

NEXT_TO_NOTHING = 1 << 16  # bytes: less than any file of ours whose write can fail short


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _prefix(target: Path) -> str:
    return f".{target.name[:32]}."  # a name may have 255 bytes: leave room for what is appended


# Endings of hidden folders beside a target: what is being written, and what is being replaced.
PARTIAL, REPLACED = ".partial", ".replaced"
LOCKING_SECONDS = 2.0  # more than passes between making such a folder and locking it


def _sweep(target: Path) -> None:
    """Clear up after processes that were killed while they wrote `target`: nobody locks their folders."""
    start = glob.escape(_prefix(target))
    for left in (*target.parent.glob(f"{start}*{REPLACED}"), *target.parent.glob(f"{start}*{PARTIAL}")):
        with contextlib.suppress(OSError), _locked(left):
            if time.time() - left.stat().st_mtime < LOCKING_SECONDS:
                continue  # its process may not have come to lock it yet
            old = left / target.name
            if left.suffix == REPLACED and not old.exists():
                continue  # of another target, whose name starts alike
            if left.suffix == REPLACED and not target.exists():  # killed between the two renames of _move
                os.rename(old, target)
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _hidden_folder(target: Path, ending: str) -> Iterator[Path]:
    """A new folder beside `target`, locked while its process lives and gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=ending, dir=target.parent))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a disk without locks: then nobody sweeps it either
            stack.enter_context(_locked(folder))
        yield folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; it ends with the process, however that ends.

    Raises:
        OSError: another process holds it, or this disk has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_dir(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a scratch folder that becomes `target` on success and vanishes on failure.

    An interrupted command leaves either the old folder or none: files are synced, then the scratch folder
    is renamed. With `replace`, the old folder is moved aside first and removed last.

    Raises:
        ArtifactError: `target` exists and `replace` is False.
        EnvironmentFault: the disk is full or not writable.
    """
    target = Path(target).resolve()  # a link to a folder stays one
    if target.is_mount():
        raise ArtifactError(f"{target} is a mount point, needed a folder below it", "choose another --out")
    if target.exists() and target == Path.cwd():  # it cannot be replaced under our feet
        raise ArtifactError(
            f"{target} is the working directory, needed another folder", "choose another --out"
        )
    _sweep(target)
    if not replace:
        _refuse_content(target)
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(_hidden_folder(target, PARTIAL))
        except OSError as exc:
            raise EnvironmentFault(
                f"cannot write in {target.parent}: {exc.strerror}", "choose another --out"
            ) from exc
        try:
            yield scratch
            for path in scratch.rglob("*"):
                if path.is_file():
                    with path.open("rb") as handle:
                        os.fsync(handle.fileno())
            scratch.chmod(0o755)  # mkdtemp makes it private
            if not replace:
                _refuse_content(target)  # what came there meanwhile, from another command or from the user
            _move(scratch, target)
            _fsync_dir(target.parent)
        except Exception as exc:
            if _disk_full(exc, scratch):
                raise EnvironmentFault(
                    f"no space left on the disk of {target.parent}", "free some space and rerun"
                ) from exc
            raise


def _move(scratch: Path, target: Path) -> None:
    """Rename a folder to `target`, in place of what is there."""
    if not target.exists():
        os.rename(scratch, target)
        return
    with _hidden_folder(target, REPLACED) as aside:
        os.rename(target, aside / target.name)
        try:
            os.rename(scratch, target)
        except OSError:
            os.rename(aside / target.name, target)
            raise


def _refuse_content(target: Path) -> None:
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ArtifactError(
            f"{target} already exists and is not empty", "choose another --out or pass --overwrite"
        )


@contextlib.contextmanager
def exclusive(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """One process of this machine at a time writes `folder`.

    Args:
        on_wait: Called once if another process is at it, which is then waited for; None refuses instead.

    Raises:
        ArtifactError: another process is at it.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"recast-{os.getuid()}-{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_wait is None:
            raise ArtifactError(
                f"another process is writing {folder}", "wait for it, or choose another folder"
            ) from None
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def refuse_inside(inner: Mapping[str, Path | None], outer: Mapping[str, Path | None]) -> None:
    """Refuse an output inside an input, or an input inside an output that `--overwrite` would remove.

    Args:
        inner, outer: Option -> what it names; none of the former may lie inside one of the latter.

    Raises:
        ArtifactError: naming both.
    """
    for option, path in inner.items():
        for other, folder in outer.items():
            if path is not None and folder is not None and path.resolve().is_relative_to(folder.resolve()):
                raise ArtifactError(f"{option} {path} lies inside {other} {folder}", "choose another --out")


def _disk_full(exc: Exception, folder: Path) -> bool:
    """Whether a failed write met a full disk.

    Only some libraries say so with an errno: polars and safetensors have it in their text, while numpy, torch
    and faiss just report a short write, which leaves next to nothing free.
    """
    if isinstance(exc, RecastError):
        return False
    if getattr(exc, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(exc):
        return True
    return isinstance(exc, OSError | RuntimeError) and shutil.disk_usage(folder).free < NEXT_TO_NOTHING


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the name of a scratch file that becomes `path` on success and vanishes on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
    os.close(fd)
    scratch = Path(name)
    try:
        yield scratch
        with scratch.open("rb") as handle:
            os.fsync(handle.fileno())
        scratch.chmod(0o644)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def atomic_text(path: Path, text: str) -> None:
    """Write a small text file all or nothing (temporary name, fsync, rename)."""
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
