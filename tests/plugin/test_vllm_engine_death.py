"""vLLM's engine dies under its server: who waits for an answer is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm")]

# The engine is stopped before it is killed, so that the call is certainly one that it has not answered.
SERVER = """
import asyncio
import signal
import sys

import psutil
from verl_recast.platform import vllm_cpu

vllm_cpu.answer_for_vllm()
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from verl_recast.rollout.vllm_server import end_with


async def main():
    arguments = AsyncEngineArgs(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128)
    engine = AsyncLLM.from_engine_args(arguments)
    ending = asyncio.create_task(end_with(engine))
    await engine.reset_prefix_cache()
    below = psutil.Process().children(recursive=True)
    for process in below:
        process.send_signal(signal.SIGSTOP)
    call = asyncio.create_task(engine.reset_prefix_cache())
    await asyncio.sleep(2)
    print(f"waits: {not call.done()}, watched: {not ending.done()}", flush=True)
    for process in below:
        process.kill()
    await call
    print("answered", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_call_that_a_dead_engine_never_answers_ends_with_its_server(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    program = tmp_path / "server.py"
    program.write_text(SERVER, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program), str(tokenizer_folder / "model")],
        env={**os.environ, "VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "waits: True, watched: True" in done.stdout, done.stderr[-2000:]
    assert "answered" not in done.stdout
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("EngineDeadError: ")
