"""The shim that Serve pickles by value: a call goes to the replica its first argument names."""

from typing import Any

from ray.serve.request_router import RequestRouter


class PickReplica(RequestRouter):  # type: ignore[misc]  # Ray is untyped
    async def choose_replicas(
        self, candidate_replicas: Any, pending_request: Any = None
    ) -> list[list[Any]]:
        wanted = pending_request.args[0]
        return [[r for r in candidate_replicas if r.replica_id.unique_id == wanted]]

    def update_replicas(self, replicas: Any) -> None:
        from cluster import directory

        super().update_replicas(replicas)
        directory.update({r.replica_id.unique_id: r.replica_metadata for r in replicas})
