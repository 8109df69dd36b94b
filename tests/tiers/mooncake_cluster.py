"""Mooncake on loopback: a real master and a process that holds pages, ended afterwards."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

HOLDER = """
import sys, time
from mooncake.store import MooncakeDistributedStore
metadata, master, size, disk = sys.argv[1:]
store = MooncakeDistributedStore()
options = {"enable_ssd_offload": True, "ssd_offload_path": disk} if disk else {}
code = store.setup("127.0.0.1", metadata, int(size), 16 << 20, "tcp", "", master, **options)
print("ready" if code == 0 else f"failed {code}", flush=True)
while True:
    time.sleep(1)
"""


# A file for each page, as soon as it is there; by default pages are gathered until they are many.
OFFLOAD = {
    "MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR": "file_per_key_storage_backend",
    "MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS": "1",
    "MOONCAKE_OFFLOAD_USE_URING": "0",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """`size`: bytes of the holder's memory. `disk`: where it may offload to."""

    def __init__(self, directory: Path, size: int = 64 * 2**20, disk: Path | None = None):
        self.directory, self.size, self.disk = directory, size, disk
        self.rpc, self.http, self.metrics = (free_port() for _ in range(3))
        self.metadata = f"http://127.0.0.1:{self.http}/metadata"
        self._processes: list[subprocess.Popen[str]] = []
        self.start_master()
        self.start_holder()

    def start_master(self) -> None:
        spec = find_spec("mooncake")
        assert spec is not None and spec.submodule_search_locations
        binary = Path(spec.submodule_search_locations[0]) / "mooncake_master"
        command = [
            str(binary), "-rpc_address", "127.0.0.1", "-rpc_port", str(self.rpc),
            "-enable_http_metadata_server=true", "-http_metadata_server_host", "127.0.0.1",
            "-http_metadata_server_port", str(self.http), "-metrics_port", str(self.metrics),
            f"-enable_offload={'true' if self.disk else 'false'}",
            "-default_kv_lease_ttl=500",  # milliseconds that what was asked for stays in memory
        ]  # fmt: skip
        self.master = self._start(command)
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.rpc), 1).close()
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                    f"{self.metadata}?key=none", timeout=1
                )
            except urllib.error.HTTPError:
                return  # it answers that there is no such key
            except OSError:
                assert time.monotonic() < deadline, "the master does not start"
                time.sleep(0.05)

    def start_holder(self) -> None:
        arguments = [self.metadata, f"127.0.0.1:{self.rpc}", str(self.size), str(self.disk or "")]
        self.holder = self._start([sys.executable, "-c", HOLDER, *arguments])
        assert self.holder.stdout is not None
        for line in self.holder.stdout:
            if line.startswith(("ready", "failed")):
                assert line.strip() == "ready", line
                return
        raise AssertionError("the holder ended")

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE if command[0] == sys.executable else None,
            stderr=subprocess.DEVNULL, text=True, cwd=self.directory, env=os.environ | OFFLOAD,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def kill(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait(20)

    def config(self, name: str = "mooncake.json", **changes: object) -> str:
        path = self.directory / name
        values = {
            "master_server_address": f"127.0.0.1:{self.rpc}",
            "metadata_server": self.metadata,
            "secret_file": str(self.directory / "secret"),
            "local_buffer_size": "16MiB",
        }
        path.write_text(json.dumps(values | changes))
        return str(path)

    def close(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                self.kill(process)
            if process.stdout is not None:
                process.stdout.close()
