"""Results are written all or nothing, and never over an input."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from recast_cli import outputs
from recast_cli.errors import ArtifactError, DataError, EnvironmentFault

FULL = Path("/dev/full")  # Linux: every write fails with ENOSPC
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")


def run_child(program: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def old_artifact(path: Path) -> Path:
    path.mkdir()
    (path / "old.txt").write_text("old")
    return path


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


# --- atomic_dir


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with outputs.atomic_dir(target) as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "a.txt").write_text("a")
        assert not target.exists()
    assert tree(tmp_path) == {"deep/out/sub/a.txt": "a"}
    assert target.stat().st_mode & 0o777 == 0o755


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), outputs.atomic_dir(tmp_path / "out") as scratch:
        (scratch / "a.txt").write_text("a")
        raise KeyError("half-way")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    target = old_artifact(tmp_path / "out")
    with pytest.raises(KeyError), outputs.atomic_dir(target, replace=True) as scratch:
        (scratch / "new.txt").write_text("new")
        raise KeyError("half-way")
    assert tree(tmp_path) == {"out/old.txt": "old"}


def test_replacing_leaves_only_the_new_folder(tmp_path: Path) -> None:
    target = old_artifact(tmp_path / "out")
    with outputs.atomic_dir(target, replace=True) as scratch:
        (scratch / "new.txt").write_text("new")
        assert tree(target) == {"old.txt": "old"}
    assert tree(tmp_path) == {"out/new.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    target = old_artifact(tmp_path / "out")
    with pytest.raises(ArtifactError, match="already exists") as caught, outputs.atomic_dir(target):
        raise AssertionError("must not get here")
    assert "--overwrite" in caught.value.hint
    assert tree(tmp_path) == {"out/old.txt": "old"}


def test_what_came_there_meanwhile_is_refused_and_kept(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="already exists"), outputs.atomic_dir(tmp_path / "out"):
        old_artifact(tmp_path / "out")
    assert tree(tmp_path) == {"out/old.txt": "old"}


def test_an_input_inside_the_folder_to_replace_is_refused(tmp_path: Path) -> None:
    inside, beside = tmp_path / "out" / "raw" / "log.csv", tmp_path / "out.csv"
    out = {"--out": tmp_path / "out"}
    outputs.refuse_inside({"--interactions": beside, "--items": None}, out)
    outputs.refuse_inside(out, {"--model": None})
    with pytest.raises(ArtifactError, match=r"--items .*log.csv lies inside --out"):
        outputs.refuse_inside({"--interactions": beside, "--items": inside}, out)


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with outputs.atomic_dir(tmp_path / "out") as scratch:
        (scratch / "a.txt").write_text("a")
    assert tree(tmp_path) == {"out/a.txt": "a"}


CRASH = """
    import os, sys
    from pathlib import Path
    from recast_cli.outputs import atomic_dir
    with atomic_dir(Path(sys.argv[1]), replace=True) as scratch:
        (scratch / "half.txt").write_text("half")
        os._exit(9)  # no clean-up of any kind, as after kill -9 or a power cut
"""


def test_a_crash_half_way_leaves_none(tmp_path: Path) -> None:
    assert run_child(CRASH, tmp_path / "out").returncode == 9
    assert not (tmp_path / "out").exists()


def test_a_crash_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    target = old_artifact(tmp_path / "out")
    assert run_child(CRASH, target).returncode == 9
    assert tree(target) == {"old.txt": "old"}


def test_the_next_one_sweeps_up_after_a_crash(tmp_path: Path) -> None:
    assert run_child(CRASH, tmp_path / "out").returncode == 9
    (left,) = tmp_path.iterdir()
    other = tmp_path / ".out.notes"  # not ours: no scratch folder has this ending
    other.mkdir()
    with outputs.atomic_dir(tmp_path / "out"):
        assert left.exists()  # so young that its process might be about to lock it
    (tmp_path / "out").rmdir()
    os.utime(left, (1, 1))
    with outputs.atomic_dir(tmp_path / "out") as scratch:
        (scratch / "a.txt").write_text("a")
        # A second writer leaves the scratch folder of the first, who is alive, alone.
        with pytest.raises(KeyError), outputs.atomic_dir(tmp_path / "out"):
            raise KeyError
    assert tree(tmp_path) == {"out/a.txt": "a"} and other.is_dir()


CRASH_IN_BETWEEN = """
    import os, sys
    from pathlib import Path
    from recast_cli.outputs import atomic_dir
    rename = os.rename
    def stop_after(source, to):
        rename(source, to)
        os._exit(9)
    with atomic_dir(Path(sys.argv[1]), replace=True) as scratch:
        (scratch / "new.txt").write_text("new")
        os.rename = stop_after
"""


def test_a_crash_between_the_renames_is_made_good(tmp_path: Path) -> None:
    target = old_artifact(tmp_path / "out")
    assert run_child(CRASH_IN_BETWEEN, target).returncode == 9
    assert not target.exists()
    for left in tmp_path.iterdir():
        os.utime(left, (1, 1))
    with pytest.raises(ArtifactError, match="already exists"), outputs.atomic_dir(target):
        pytest.fail("the old one was lost")
    assert tree(tmp_path) == {"out/old.txt": "old"}


def test_the_old_one_comes_back_if_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = old_artifact(tmp_path / "out")
    rename = os.rename

    def refuse(source: Path, to: Path) -> None:
        if Path(to) == target and (Path(source) / "new.txt").exists():
            raise PermissionError(errno.EPERM, "refused")
        rename(source, to)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError), outputs.atomic_dir(target, replace=True) as scratch:
        (scratch / "new.txt").touch()
    assert tree(tmp_path) == {"out/old.txt": "old"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_half_way_leaves_nothing_at_all(tmp_path: Path, number: signal.Signals) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from recast_cli import main
        from recast_cli.outputs import atomic_dir
        def boom():
            with atomic_dir(target) as scratch:
                (scratch / "half.txt").write_text("half")
                print("ready", flush=True)
                time.sleep(60)
        main.app.command("boom")(boom)
        sys.argv[1:], target = ["boom"], Path(sys.argv[1])
        main.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        assert child.wait(timeout=30) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert list(tmp_path.iterdir()) == []


# --- a disk that is full, for real

WRITERS = {
    "python": "(scratch / 'big').write_bytes(bytes(4 << 20))",
    "numpy": "import numpy as np; np.save(scratch / 'big.npy', np.zeros(1 << 19))",
    "numpy archive": "import numpy as np; np.savez(scratch / 'big.npz', a=np.random.rand(1 << 19))",
    "polars": "import polars as pl; pl.DataFrame({'a': range(1 << 20)}).write_parquet(scratch / 'big')",
    "torch": "import torch; torch.save(torch.rand(1 << 20), scratch / 'big.pt')",
    "safetensors": "import torch, safetensors.torch as st; "
    "st.save_file({'a': torch.rand(1 << 20)}, scratch / 'big')",
}

FILL = """
    import sys
    from pathlib import Path
    from recast_cli.outputs import atomic_dir
    from recast_cli.errors import EnvironmentFault
    try:
        with atomic_dir(Path(sys.argv[1]) / "out", replace=True) as scratch:
            exec(sys.argv[2])
    except EnvironmentFault as exc:
        print(exc.message, "|", exc.hint)
    for path in sorted(Path(sys.argv[1]).rglob("*")):
        print(path.relative_to(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def small_disk() -> list[str]:
    """Command prefix under which a 1 MiB disk can be mounted, in a mount namespace of its own."""
    prefix = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    probe = [*prefix, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(probe, capture_output=True, check=False).returncode != 0
    ):
        pytest.skip("cannot mount a small disk here; the /dev/full and file size tests still run")
    return prefix


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_error_in_words(tmp_path: Path, small_disk: list[str], writer: str) -> None:
    # mount, keep an old artifact there, then write 4 MiB and more to the 1 MiB disk
    script = (
        'mount -t tmpfs -o size=1m tmpfs "$1" && mkdir "$1/out" && touch "$1/out/old" &&'
        ' exec "$2" -c "$3" "$1" "$4"'
    )
    command = [
        *small_disk,
        "sh",
        "-c",
        script,
        "sh",
        tmp_path,
        sys.executable,
        textwrap.dedent(FILL),
        WRITERS[writer],
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said, *left = done.stdout.splitlines()
    assert said == f"no space left on the disk of {tmp_path} | free some space and rerun"
    assert left == ["out", "out/old"]


@needs_full
def test_no_space_left_by_errno(tmp_path: Path) -> None:
    with (
        pytest.raises(EnvironmentFault, match="no space left on the disk"),
        outputs.atomic_dir(tmp_path / "out"),
        FULL.open("wb", buffering=0) as handle,
    ):
        handle.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_other_write_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), outputs.atomic_dir(tmp_path / "out") as scratch:
        (scratch / "missing" / "a.txt").write_text("a")
    with pytest.raises(DataError, match="bad row"), outputs.atomic_dir(tmp_path / "out"):
        raise DataError("bad row", "mend it")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(EnvironmentFault, match="cannot write in"),
        outputs.atomic_dir(tmp_path / "file" / "out"),
    ):
        raise AssertionError("must not get here")


# --- atomic_text


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    outputs.atomic_text(path, "one")
    outputs.atomic_text(path, "zwölf")
    assert path.read_bytes() == "zwölf".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert [found.name for found in path.parent.iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    program = """
        import sys
        from pathlib import Path
        from recast_cli.outputs import atomic_text
        atomic_text(Path(sys.argv[1]), "x" * 100_000)
    """

    def limit() -> None:  # the kernel refuses to let any file of the child grow beyond this
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = run_child(program, path, preexec_fn=limit, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert "File too large" in done.stderr
    assert tree(tmp_path) == {"a.txt": "old"}


def test_a_name_as_long_as_the_disk_takes(tmp_path: Path) -> None:
    for _ in range(2):
        with outputs.atomic_dir(tmp_path / ("x" * 255), replace=True) as scratch:
            (scratch / "file").touch()
    outputs.atomic_text(tmp_path / ("y" * 255), "text")
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["x", "y"]


def test_a_mount_point_and_the_working_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for target, reason in ((Path("."), "is the working directory"), (Path("/proc"), "is a mount point")):
        with pytest.raises(ArtifactError, match=reason), outputs.atomic_dir(target, replace=True):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with outputs.atomic_dir(tmp_path / "out") as scratch:
        (scratch / "file").touch()
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "file").exists()


def test_a_second_writer_of_a_folder_is_refused(tmp_path: Path) -> None:
    with outputs.exclusive(tmp_path / "out"):
        with outputs.exclusive(tmp_path / "other"):
            pass
        with (
            pytest.raises(ArtifactError, match="another process is writing"),
            outputs.exclusive(tmp_path / "out"),
        ):
            pass
    with outputs.exclusive(tmp_path / "out"):
        pass
