"""A Ray cluster that somebody else started, with an actor and a placement group of theirs."""

import json
import os
import secrets
import subprocess
import sys
import time

ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Of all who meet on the cluster."""
_CLUSTER = """
import json, sys
import ray
from ray.util.placement_group import placement_group, placement_group_table

ray.init(address="local", num_cpus=4, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=0)
class Bystander:
    pass

bystander = Bystander.options(name="bystander", namespace="other", lifetime="detached").remote()
ray.get(placement_group([{"CPU": 1}], name="bystanders", lifetime="detached").ready())
print(ray.get_runtime_context().gcs_address, flush=True)
for command in sys.stdin:
    if command.strip() == "crash":
        controller = ray.get_actor("loraplex-controller", namespace="loraplex")
        ray.kill(controller, no_restart=False)
    if command.strip() in ("crash", "replica"):
        (name,) = (a["name"] for a in ray.util.list_named_actors(True) if a["name"].startswith("loraplex-replica-"))
        print(ray.get_actor(name, namespace="loraplex")._actor_id.hex(), flush=True)
        continue
    actors = sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))
    groups = sorted(g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED")
    print(json.dumps(actors + groups), flush=True)
"""


class Cluster:
    """A Ray of another process, with an actor and a placement group of somebody else."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        self.address = self._read()

    def holds(self) -> list[str]:
        """Names of all actors and placement groups."""
        return list(json.loads(self._ask("")))

    def replica(self) -> str:
        """Ray's id of the replica."""
        return self._ask("replica")

    def crash_controller(self) -> str:
        """Kills it; returns Ray's id of the replica."""
        return self._ask("crash")

    def wait_holds(self, expected: list[str]) -> None:
        deadline_s = time.monotonic() + 30
        while self.holds() != expected:
            assert time.monotonic() < deadline_s, self.holds()
            time.sleep(0.2)

    def _ask(self, command: str) -> str:
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the cluster ended"
        return line
