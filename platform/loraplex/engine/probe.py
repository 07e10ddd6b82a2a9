"""The engine's own question to a suspect executor: one token of the plain base, which no tenant's content can spoil.

Pure. Called by ``engine``.
"""

from loraplex.core.ids import BaseModelId, RequestId, TenantName
from loraplex.core.request import EngineRequest, SamplingParams

_NOBODY = TenantName("")
"""No tenant can have this name."""


def probe_request(base_model_id: BaseModelId) -> EngineRequest:
    return EngineRequest(
        request_id=RequestId("probe"),
        tenant=_NOBODY,
        base_model_id=base_model_id,
        adapter=None,
        prompt_token_ids=(0,),
        sampling=SamplingParams(max_tokens=1, seed=0, temperature=0.0),
        arrival_s=0.0,
        cache_salt="",
    )
