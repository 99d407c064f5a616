"""A Ray cluster of several nodes on this machine, as a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from tests.service import ROOT, START

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_worker_niceness": "0",
    "RAY_agent_register_timeout_ms": "120000",
}


class Nodes:
    """``count`` nodes with ``free`` CPUs each, a context manager. The first is the head."""

    def __init__(self, count: int, free: float) -> None:
        # A socket's path is short, so pytest's own folders will not do.
        self._home = tempfile.mkdtemp(prefix="nodes-", dir="/tmp")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nodes", self._home, str(count), str(free)],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Ray tells at length of nodes that are killed
            text=True,
        )
        self.address = ""
        self.raylets: list[int] = []  # process ids

    def __enter__(self) -> Nodes:
        try:
            found = self._listen()
        except BaseException:
            self.__exit__()
            raise
        self.address, self.raylets = found["address"], found["raylets"]
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._process.communicate(timeout=START)  # closes its input
        finally:
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self._home, ignore_errors=True)

    def kill(self, raylet: int) -> None:
        """A node and all that runs on it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{raylet}\n")
        self._process.stdin.flush()
        assert self._listen() == {"killed": raylet}

    def _listen(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the cluster does not start"
        found: dict[str, Any] = json.loads(line)
        return found


def main(home: str, count: int, free: float) -> None:
    says, sys.stdout = sys.stdout, sys.stderr  # Ray prints, too
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Load:
        def ready(self) -> None:
            pass

    def say(what: dict[str, Any]) -> None:
        says.write(json.dumps(what) + "\n")
        says.flush()

    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    head = {**node, "include_dashboard": False, "temp_dir": home}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(count - 1):
        cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    loads = []  # CPUs that others have: nodes are given in whole ones
    for each in ray.nodes():
        where = NodeAffinitySchedulingStrategy(each["NodeID"], soft=False)
        options = {"num_cpus": 1 - free, "scheduling_strategy": where}
        loads.append(ray.remote(Load).options(**options).remote())
    ray.get([load.ready.remote() for load in loads], timeout=START)
    nodes = {
        each.all_processes["raylet"][0].process.pid: each
        for each in (cluster.head_node, *cluster.worker_nodes)
    }
    say({"address": cluster.address, "raylets": [*nodes]})
    for line in sys.stdin:
        cluster.remove_node(nodes[int(line)], allow_graceful=False)
        say({"killed": int(line)})
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
