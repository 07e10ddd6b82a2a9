"""What route functions get of the call: its principal and its info, put into the scope by the edge."""

from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from loraplex.gateway.call import CallInfo
from loraplex.gateway.directory import Principal
from loraplex.gateway.routes.edge import CALL_INFO, PRINCIPAL

_bearer = HTTPBearer(auto_error=False, description="An API key of the tenant, or the administrator's.")


async def _principal(request: Request, _documented: Annotated[object, Depends(_bearer)]) -> Principal:
    return cast(Principal, request.scope[PRINCIPAL])


async def _info(request: Request) -> CallInfo:
    return cast(CallInfo, request.scope[CALL_INFO])


Caller = Annotated[Principal, Depends(_principal)]
Info = Annotated[CallInfo, Depends(_info)]
