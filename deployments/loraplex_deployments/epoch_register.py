"""The latest controller epoch that this Ray cluster has heard of, so that the commands of a replaced controller fail.

Kept in the key-value store of Ray's head. Replicas refuse by themselves as well; the register is for commands that no
running replica hears. Called by the actuator.
"""

import hashlib

from loraplex.core.errors import Unavailable
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

_NAMESPACE = b"loraplex"


def superseded(epoch: int, latest: int) -> Unavailable:
    return Unavailable(f"this controller (epoch {epoch}) was replaced by one of epoch {latest}", code="superseded")


class EpochRegister:
    def __init__(self, cluster_secret: str) -> None:
        """Epochs of another database, which has another secret, do not count."""
        self._key = b"epoch-" + hashlib.sha256(cluster_secret.encode()).hexdigest()[:16].encode()

    def check(self, epoch: int) -> None:
        """Notes ``epoch`` if it is the latest; raises Unavailable, ``superseded``, if it is not. Blocking.

        Two controllers that look at the same instant may both pass: the replica that the older one starts then looks
        again once it is ready.
        """
        held = _internal_kv_get(self._key, namespace=_NAMESPACE)
        latest = int(held) if held else 0
        if epoch < latest:
            raise superseded(epoch, latest)
        if epoch > latest:
            _internal_kv_put(self._key, str(epoch), overwrite=True, namespace=_NAMESPACE)

    def forget(self) -> None:
        """At a clean stop."""
        _internal_kv_del(self._key, namespace=_NAMESPACE)
