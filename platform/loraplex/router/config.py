"""The router's own settings: how long requests wait, for what, and how replicas are preferred."""

from typing import Annotated, Literal

import msgspec

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    policy: Literal["predicted-finish", "least-loaded", "consistent-hash", "pow2-multiplexed"] = "predicted-finish"
    """Who chooses among replicas with room. The others are there to be compared with; the queue is the same."""
    max_queued_requests: Annotated[int, msgspec.Meta(ge=0)] = 512
    """Generations of one base that wait in this router for a replica's credit; what is more is refused."""
    max_queue_wait_s: _Positive = 60.0
    """A generation that no replica took for this long is refused."""
    max_unserved_wait_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    """Instead, where no replica of the base takes requests at the time of arrival: it is being started. 0: refused at
    once."""
    drain_migrate_above_s: Annotated[float, msgspec.Meta(ge=0)] = 2.0
    """Of a draining replica's requests those that are predicted to go on for longer than this move to another replica
    at once, the others may end where they are."""
    drain_timeout_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    """From then on all of them move as soon as another replica has room."""
    rebalance_min_gain_s: Annotated[float, msgspec.Meta(ge=0)] | None = 1.0
    """A request that would end so much sooner on another replica than where it is, and in 0.7 of the time, goes there,
    once; None: never. Of ``policy`` predicted-finish alone."""
    resume_timeout_s: _Positive = 60.0
    """Generations of a lost replica are given up when none could take them over for this long. Longer than a replica
    takes to start again: with an 8B model on a GPU half a minute."""
    max_losses: Annotated[int, msgspec.Meta(ge=1)] = 3
    """A request that loses this many replicas in a row without a token in between is given up: it may be what breaks
    them."""
    ttft_slo_s: _Positive | None = None
    """From arrival to the first token, for requests that do not say when it is due; None: no target."""
    ttft_patience: Annotated[float, msgspec.Meta(ge=1)] = 2.0
    """An online request whose first token is predicted to come after this many times its target is refused at once,
    with the time after which to try again."""
    profiles: tuple[str, ...] = ()
    """Cost profiles, shipped ones by name or files, from which the time of a request on a replica is predicted; of a
    replica whose GPU type, base and shape none of them knows it is measured."""
    expected_output_tokens: _Positive = 256.0
    """Of a generation, until some have ended."""
    adapter_load_s: Annotated[float, msgspec.Meta(ge=0)] = 0.005
    """From host memory to the accelerator, where no profile tells."""
    adapter_fetch_s: Annotated[float, msgspec.Meta(ge=0)] = 0.05
    """Into the host memory of a replica that has not had it yet; likewise."""
    max_prefixes: Annotated[int, msgspec.Meta(ge=0)] = 16384
    """Beginnings of prompts, of each base, of which the router remembers where they went; 0: prompts go where the work
    is least, whatever they begin with."""
    decode_weight: Annotated[float, msgspec.Meta(ge=0)] = 0.1
    """What a second of the tokens after the first counts beside one until the first, when replicas are compared."""
    alike_s: Annotated[float, msgspec.Meta(ge=0)] = 0.001
    """Replicas that are predicted to serve a request equally soon, but for this, are told apart by affinity."""
    reconnect_min_s: _Positive = 0.05
    """First pause after a broken stream; doubled with each failure in a row."""
    reconnect_max_s: _Positive = 2.0
    """Longest of these pauses."""
    silence_s: _Positive = 3.0
    """A replica that was not heard of for this long, and for three of its heartbeats, is taken for lost: it hangs, or
    the network does."""
