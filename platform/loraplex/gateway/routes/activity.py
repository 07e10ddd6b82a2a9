"""GET /v1/activity: what this gateway served lately, for the administrator's live view."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from loraplex.core.ids import GatewayId
from loraplex.gateway.activity import MAX_WINDOW_S, Activity
from loraplex.gateway.routes import replies
from loraplex.gateway.routes.access import Caller
from loraplex.gateway.routes.json_reply import json_reply

_Seconds = Annotated[float, Query(gt=0, allow_inf_nan=False)]


def activity_routes(activity: Activity, *, gateway_id: GatewayId, num_queued: Callable[[], int]) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/activity", tags=["administration"], response_model=replies.ActivityReply, responses=replies.ERRORS)
    async def recent(
        caller: Caller,
        window_s: Annotated[float, Query(gt=0, le=MAX_WINDOW_S)] = 60.0,
        ttft_s: _Seconds | None = None,
        tpot_s: _Seconds | None = None,
        max_adapters: Annotated[int, Query(ge=0, le=1000)] = 100,
    ) -> Response:
        """Requests that ended in the last seconds; `good` are those within the targets that are given."""
        caller.require_admin()
        summary = activity.summary(
            window_s=window_s,
            ttft_s=math.inf if ttft_s is None else ttft_s,
            tpot_s=math.inf if tpot_s is None else tpot_s,
            max_adapters=max_adapters,
        )
        return json_reply(
            {
                "object": "activity",
                "gateway": gateway_id,
                "queued": num_queued(),
                "window_s": summary.window_s,
                "total": dataclasses.asdict(summary.total),
                "tenants": [
                    {"tenant": tenant, "served": dataclasses.asdict(served)}
                    for tenant, served in summary.tenants.items()
                ],
                "adapters": [dataclasses.asdict(adapter) for adapter in summary.adapters],
            }
        )

    return router
