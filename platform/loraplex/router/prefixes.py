"""Which replicas have computed the beginnings of a prompt, as far as this router sent them there. Mutable; called by
``pool``.

A prompt is known by hashes of its first 64, 128, 256, ... tokens; of each the replicas that got it last are kept. What
they have evicted since is not known: an estimate, bounded in size, the least recently used beginnings forgotten first.
"""

import hashlib
from array import array
from collections import OrderedDict

from loraplex.core.ids import ReplicaId
from loraplex.core.request import EngineRequest

_FIRST_TOKENS = 64
_NUM_REPLICAS = 4
"""That are kept of a beginning, the last ones."""


Prefixes = tuple[tuple[int, bytes], ...]
"""(tokens, hash) of beginnings of a prompt."""


class PrefixMap:
    def __init__(self, max_prefixes: int) -> None:
        self._max_prefixes = max_prefixes
        self._replicas: OrderedDict[bytes, tuple[ReplicaId, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replicas)

    def saved_tokens(self, prefixes: Prefixes) -> dict[ReplicaId, int]:
        """Tokens of the prompt that each replica is thought to have; replicas with none are left out."""
        saved: dict[ReplicaId, int] = {}
        for num_tokens, key in prefixes:
            for replica_id in self._replicas.get(key, ()):
                saved[replica_id] = num_tokens
        return saved

    def sent(self, prefixes: Prefixes, replica_id: ReplicaId) -> None:
        """The replica will compute this prompt. Changes state."""
        # The shortest last: they serve most prompts, and so are forgotten last.
        for _, key in reversed(prefixes):
            known = self._replicas.get(key, ())
            if not known or known[-1] != replica_id:
                others = tuple(other for other in known if other != replica_id)
                self._replicas[key] = (*others[1 - _NUM_REPLICAS :], replica_id)
            self._replicas.move_to_end(key)
        while len(self._replicas) > self._max_prefixes:
            self._replicas.popitem(last=False)

    def forget(self, replica_id: ReplicaId) -> None:
        """It lost all that it had. Changes state."""
        for key, known in tuple(self._replicas.items()):
            if replica_id in known:
                left = tuple(other for other in known if other != replica_id)
                if left:
                    self._replicas[key] = left
                else:
                    del self._replicas[key]


def prefixes_of(request: EngineRequest) -> Prefixes:
    """Shortest first. KV is shared within a tenant's salt and an adapter alone."""
    prompt = request.prompt_token_ids
    digest = request.adapter.digest if request.adapter is not None else ""
    hashed = hashlib.blake2b(b"\0".join((request.cache_salt.encode(), digest.encode())), digest_size=16)
    found: list[tuple[int, bytes]] = []
    start, end = 0, _FIRST_TOKENS
    while end <= len(prompt):
        hashed.update(array("q", prompt[start:end]))
        found.append((end, hashed.digest()))
        start, end = end, 2 * end
    return tuple(found)
