"""Running a child process: its errors, its metrics and its end, with small real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from recast_cli.errors import EnvironmentFault
from recast_cli.training.process import cause_of, read_metrics, run_verl


@pytest.fixture
def run_child(tmp_path: Path):
    """Run a module made of this source as if it were verl's."""

    def run(source: str, *arguments: str, **options):
        (tmp_path / "childmodule.py").write_text(textwrap.dedent(source), encoding="utf-8")
        return run_verl(
            ["childmodule"],
            arguments,
            environment={"PYTHONPATH": str(tmp_path), "METRICS": str(tmp_path / "metrics.jsonl")},
            cwd=tmp_path,
            log=tmp_path / "logs" / "child.log",
            metrics=tmp_path / "metrics.jsonl",
            **options,
        )

    return run


def test_arguments_environment_directory_and_metrics(run_child, tmp_path: Path) -> None:
    seen = []
    records = run_child(
        """
        import json, os, sys, time
        print(sys.argv[1:], os.getcwd(), file=sys.stderr)
        with open(os.environ["METRICS"], "w") as log:
            for step in (1, 2, 3):
                log.write(json.dumps({"step": step, "data": {"loss": step / 10}}) + "\\n")
                log.flush()
                time.sleep(0.3)
        """,
        "data.path='a b'",
        "x=1",
        on_step=seen.append,
    )
    assert records == seen == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.3}]
    log = (tmp_path / "logs" / "child.log").read_text()
    assert log.strip() == f"{['data.path=' + chr(39) + 'a b' + chr(39), 'x=1']} {tmp_path}"


def test_failure_names_the_cause_the_exit_code_and_the_log(run_child, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        run_child("raise KeyError('first')\n")
    assert caught.value.message == "childmodule exited with 1: KeyError: 'first'"
    assert caught.value.hint == f"read {tmp_path / 'logs' / 'child.log'}"
    with pytest.raises(EnvironmentFault, match="exited with 3: it printed nothing"):
        run_child("raise SystemExit(3)\n")
    with pytest.raises(EnvironmentFault, match="exited with 4: last words"):
        run_child("print('first words'); print('last words'); raise SystemExit(4)\n")
    with pytest.raises(EnvironmentFault, match="exited with -9"):
        run_child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n")


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("Traceback\nValueError: a\n\nDuring handling\nRuntimeError: b\nbye\n", "RuntimeError: b"),
        (
            "\x1b[36m(TaskRunner pid=1)\x1b[0m torch.OutOfMemoryError: CUDA out of memory\nEpoch: 1\n",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        # torchrun ends with a banner that says nothing
        (
            "[rank0]: FileNotFoundError: [Errno 2] No such file or directory: 'x'\n"
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\n",
            "FileNotFoundError: [Errno 2] No such file or directory: 'x'",
        ),
        ("ray.exceptions.RayTaskError(ValueError): ray::f()\nValueError: deep\n", "ValueError: deep"),
        ("a message about ValueError: not a cause\nlast line\n", "last line"),
        ("recast_cli.errors.EnvironmentFault: no disk\n", "recast_cli.errors.EnvironmentFault: no disk"),
        ("", "it printed nothing"),
    ],
)
def test_cause_in_a_log(tmp_path: Path, log: str, cause: str) -> None:
    (tmp_path / "log").write_text(log, encoding="utf-8")
    assert cause_of(tmp_path / "log") == cause


def test_the_actor_that_died_is_named(tmp_path: Path) -> None:
    text = "ray.exceptions.ActorDiedError: The actor died.\n\tclass_name: GroupLoopWorker\n\tactor_id: c896\n"
    text += "\tpid: 1855\n\tname: agent_loop_worker_0_20\n\tnamespace: 43a7\nIt is dead because: (1) of the\n"
    (tmp_path / "log").write_text("before\n" + text)
    expected = "ray.exceptions.ActorDiedError: The actor died. (GroupLoopWorker, agent_loop_worker_0_20)"
    assert cause_of(tmp_path / "log") == expected
    (tmp_path / "log").write_text("ValueError: one\n\tof: two\n")  # an indented line of another kind
    assert cause_of(tmp_path / "log") == "ValueError: one"


def test_cause_of_a_log_that_is_missing_or_no_text(tmp_path: Path) -> None:
    assert cause_of(tmp_path / "absent") == "it printed nothing"
    (tmp_path / "log").write_bytes(b"\xff\xfe\nValueError: bytes \xff\n")
    assert cause_of(tmp_path / "log").startswith("ValueError: bytes")
    (tmp_path / "log").write_text("ValueError: " + "x" * 1000)
    assert len(cause_of(tmp_path / "log")) == 300


def test_torn_last_line_of_the_metrics_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    line = json.dumps({"step": 1, "data": {"a": 1.5}})
    path.write_text(line + "\n" + line.replace("1.5", "2.5")[:-7])
    assert read_metrics(path) == [{"step": 1, "a": 1.5}]
    path.write_text(line + "\n" + line.replace("1.5", "2.5"))  # whole, but its end has not been written yet
    assert read_metrics(path) == [{"step": 1, "a": 1.5}]
    path.write_text("")
    assert read_metrics(path) == []


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


INTERRUPTED = """
import sys
from pathlib import Path
from recast_cli.training.process import run_verl
folder = Path(sys.argv[1])
run_verl(["childmodule"], [], environment={"PYTHONPATH": sys.argv[1]}, cwd=folder, log=folder / "log",
         metrics=folder / "metrics.jsonl")
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads process states from /proc")
def test_interrupt_ends_the_whole_process_group(tmp_path: Path) -> None:
    """Also a grandchild that does not listen: its parent, the child, goes at once."""
    (tmp_path / "childmodule.py").write_text(
        textwrap.dedent(
            """
            import os, subprocess, sys, time
            deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(120)"
            deaf = "import signal, time; " + deaf
            grandchild = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
            grandchild.stdout.readline()
            with open("pids.part", "w") as out:
                out.write(f"{os.getpid()} {grandchild.pid}")
            os.rename("pids.part", "pids")
            time.sleep(120)
            """
        )
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(alive(pid) for pid in pids)
    assert os.getpgid(pids[0]) == os.getpgid(pids[1]) != os.getpgid(parent.pid)
    parent.send_signal(signal.SIGINT)
    output, _ = parent.communicate(timeout=60)
    assert b"KeyboardInterrupt" in output
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_error_in_a_callback_ends_the_child_too(run_child, tmp_path: Path) -> None:
    def fail(record: dict) -> None:
        raise RuntimeError(f"cannot show step {record['step']}")

    with pytest.raises(RuntimeError, match="cannot show step 1"):
        run_child(
            """
            import json, os, time
            open("pid", "w").write(str(os.getpid()))
            with open(os.environ["METRICS"], "w") as log:
                log.write(json.dumps({"step": 1, "data": {}}) + "\\n")
            time.sleep(120)
            """,
            on_step=fail,
        )
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own signal")
def test_a_job_ends_with_its_parent_even_if_that_is_killed(tmp_path: Path) -> None:
    program = """
        import sys, pathlib
        from recast_cli.training.process import run_verl
        folder = pathlib.Path(sys.argv[1])
        run_verl(["job"], [], environment={"PYTHONPATH": str(folder)}, cwd=folder, log=folder / "log",
                 metrics=folder / "metrics")
    """
    job = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(100)"
    (tmp_path / "job.py").write_text(job, encoding="utf-8")
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)])
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and bool(pid.read_text()))
    parent.kill()
    parent.wait()
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())))


def wait_for(done: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)
