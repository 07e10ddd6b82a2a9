"""Names of things that cross package borders. Opaque strings: only their owner makes them."""

from typing import NewType

BaseModelId = NewType("BaseModelId", str)
"""Name of a base model as clients write it, e.g. ``smollm2-135m-instruct``."""

Digest = NewType("Digest", str)
"""Lower-case hex SHA-256 of an adapter's canonical content."""

GatewayId = NewType("GatewayId", str)
ReplicaId = NewType("ReplicaId", str)
RequestId = NewType("RequestId", str)
"""One generation inside the engine. A client request with ``n=3`` owns three of them."""

TenantName = NewType("TenantName", str)
