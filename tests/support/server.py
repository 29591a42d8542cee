"""A real server for tests: `antiphon serve` in a process of its own, on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import openai

__all__ = ["ServerProcess"]

_START_S = 90


class ServerProcess:
    """Started when it is made, and ready; the end of the `with` block ends it. Its log is on stderr.

        with ServerProcess("--ranks", "2", "--dbo", "on") as server:
            server.client().completions.create(model="tiny-deepseek", prompt="Once upon a time")

    wait: whether to wait until it is ready.
    """

    def __init__(self, *words: str, wait: bool = True, **environment: str) -> None:
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115  # closed by `stop`
        self._http = httpx.Client(timeout=60, verify=False)  # a context for TLS would take longer than most answers
        command = [sys.executable, "-m", "antiphon.cli", "serve", "--port", "0", *words]
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, env={**os.environ, "COLUMNS": "200", **environment}
        )
        try:
            self.url = f"http://127.0.0.1:{self._port()}"
            if wait:
                self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text()

    def log_with(self, text: str, *, within_s: float = 10) -> str:
        """The log once it holds this text: a line is written after the answer that it tells of was sent."""
        deadline = time.monotonic() + within_s
        while text not in (log := self.log):
            assert time.monotonic() < deadline, f"not in the log: {text}\n{log}"
            time.sleep(0.01)
        return log

    def client(self, **options: Any) -> openai.OpenAI:
        """That does not try again."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60} | options
        )

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60} | options
        )

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self._http.get(self.url + path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self._http.post(self.url + path, **options)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples with this name and these labels."""
        found = [
            float(line.rpartition(" ")[2])
            for line in self.get("/metrics").text.splitlines()
            if re.match(rf"{re.escape(name)}[{{ ]", line)
            and all(f'{label}="{value}"' in line for label, value in labels.items())
        ]
        assert found, f"there is no {name} with {labels}"
        return sum(found)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while self.get("/ready").status_code != 200:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def end(self, number: signal.Signals = signal.SIGTERM, *, within_s: float = 30) -> int:
        """Send the signal, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(within_s)

    def stop(self) -> None:
        """However it is."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._http.close()
        self._log.close()

    def _port(self) -> int:
        deadline = time.monotonic() + _START_S
        while (found := re.search(r"listening.*port\W{1,3}(\d+)", self.log)) is None:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.05)
        return int(found[1])
