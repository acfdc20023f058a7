"""Real MLflow server that tests start, stop and kill."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from conftest import free_port, wait_for


class Server:
    """MLflow server in its own session, so that its workers are killed with it."""

    def __init__(self, folder: Path, arguments: list[str] | None = None) -> None:
        store = ["server", "--backend-store-uri", f"sqlite:///{folder}/store.db", "--artifacts-destination", str(folder / "files")]
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "mlflow", *(arguments or store), "--port", str(self.port), "--workers", "1"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                # job execution would start seven processes
                env=env | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @contextlib.contextmanager
    def running(self) -> Iterator[Server]:
        try:
            self.up()
            yield self
        finally:
            self.kill()

    def up(self) -> None:
        """Start the server unless it runs, and wait until it answers."""
        if self._process is None:
            self.start()
        wait_for(self._answers, 180)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
