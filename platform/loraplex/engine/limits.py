"""What a request may ask of a model: checked when it comes. Pure; called by ``engine``."""

from loraplex.core.errors import ContextTooLong, InvalidInput
from loraplex.core.model import ModelSpec
from loraplex.core.request import EngineRequest


def checked_limit(request: EngineRequest, model: ModelSpec) -> int:
    """Prompt + output tokens at most. Raises InvalidInput (wrong base, empty prompt, token outside the vocabulary,
    nothing left to generate), ContextTooLong (no room for one token)."""
    num_prompt, num_resumed = len(request.prompt_token_ids), len(request.resumed_token_ids)
    if request.base_model_id != model.base_model_id:
        raise InvalidInput(f"this replica serves {model.base_model_id}, not {request.base_model_id}")
    if num_prompt == 0:
        raise InvalidInput("the prompt is empty", param="prompt")
    for ids in (request.prompt_token_ids, request.resumed_token_ids):
        if ids and not (min(ids) >= 0 and max(ids) < model.vocab_size):
            raise InvalidInput("a token id lies outside the vocabulary", param="prompt")
    limit = min(num_prompt + request.sampling.max_tokens, model.max_context_tokens)
    if num_prompt + num_resumed >= model.max_context_tokens:
        raise ContextTooLong(
            f"{num_prompt + num_resumed} tokens leave no room in the context of {model.max_context_tokens} tokens",
            param="prompt",
        )
    if num_prompt + num_resumed >= limit:
        raise InvalidInput("no token is left to generate", param="max_tokens")
    return limit
