"""The records of the fast simulator: what it keeps of a replica, a request, an adapter, as compiled code takes it.

Owns the layout. Called by ``fast_state``, which makes the arrays.
"""

import numpy as np

REPLICA = np.dtype(
    [
        # The plan's.
        ("base", np.int32),
        ("cost", np.int32),
        ("group", np.int32),
        ("first_of_group", np.int32),
        ("end_of_group", np.int32),
        ("num_stages", np.int32),
        ("num_pages", np.int64),
        ("max_adapter_pages", np.int64),
        ("max_context", np.int64),
        # Time.
        ("step", np.int64),  # The last that is done.
        ("slot", np.int64),  # Of the plan of the step that runs.
        ("running", np.bool_),
        ("blocked", np.bool_),  # No step is planned ahead: pages lack, or another one of the group is next.
        ("fetch_free_s", np.float64),
        # The group's turns.
        ("waits", np.bool_),  # Its next step is planned and waits for the turn.
        ("asked", np.int64),  # Its place among those that ever waited.
        # Of several stages, whose steps overlap.
        ("num_planned", np.int64),  # Steps.
        ("num_in_flight", np.int64),
        ("num_in_turn", np.int64),  # Steps that began in this turn.
        ("expects_others", np.bool_),
        ("alone_s", np.float64),  # ``StepCost.alone_s``.
        ("line_free_s", np.float64),  # When the first stage is.
        ("last_end_s", np.float64),
        # A run of ``run_count`` steps of one composition, after step ``step``, begins at ``run_start_s``; the first
        # takes ``run_step_s``, each later one ``run_slope_s`` more than the one before.
        ("run_count", np.int64),
        ("run_start_s", np.float64),
        ("run_step_s", np.float64),
        ("run_slope_s", np.float64),
        # Requests.
        ("num_running", np.int64),
        ("num_waiting", np.int64),
        ("num_prefilling", np.int64),
        ("num_decoding", np.int64),
        ("decode_offset", np.int64),  # Sum over the decoding of (tokens at the start - step of the start).
        ("decode_lora", np.int64),
        ("decode_adapters", np.int64),
        ("decode_bytes", np.float64),
        ("num_ends", np.int64),
        ("num_sent", np.int64),  # Requests, those that ended too.
        ("num_fresh", np.int64),
        # Pages.
        ("num_free", np.int64),
        ("num_cached", np.int64),
        ("num_idle", np.int64),
        ("num_adapter_pages", np.int64),
        ("paged_step", np.int64),  # Pages are taken for all tokens up to this step.
        ("kv_head", np.int64),
        ("kv_tail", np.int64),
        ("idle_head", np.int64),
        ("idle_tail", np.int64),
        ("stamp", np.int64),
        # Fairness.
        ("num_tenants", np.int64),
        # Figures.
        ("busy_s", np.float64),
        ("num_steps", np.int64),
        ("num_preemptions", np.int64),
        ("num_loads", np.int64),
        ("num_loaded_pages", np.int64),
    ],
    align=True,
)

REQUEST = np.dtype(
    [
        ("key", np.int32),
        ("base", np.int32),
        ("adapter", np.int32),
        ("tenant", np.int32),
        ("replica", np.int32),
        ("outcome", np.int32),
        ("prompt", np.int32),
        ("output", np.int32),
        ("generated", np.int32),  # Before it was admitted last.
        ("known", np.int32),  # Tokens to compute when it was admitted last.
        ("scheduled", np.int32),
        ("planned", np.int32),  # Steps, planned and not done, that hold a chunk of it.
        ("position", np.int32),  # In its replica's list of running requests.
        ("charged", np.int32),  # Tokens whose prefill its tenant had paid for when it was preempted.
        ("order", np.int32),  # In which its replica got it.
        ("row_order", np.int32),  # Of its adapter in a step.
        ("cached", np.int32),  # Pages of its KV that are kept though it does not run.
        ("previous", np.int32),
        ("next", np.int32),
        ("pages", np.int32),  # That it holds, in a pipeline; with one stage they follow from the step.
        ("draws", np.int32),  # Tokens since it was admitted last, in a pipeline, with those in flight,
        ("drawn", np.int32),  # and without.
        ("last_planned", np.int64),  # Of a pipeline, the last step that holds it.
        ("start_step", np.int64),  # Of decoding; NONE while it prefills.
        ("last_step", np.int64),
        ("passed", np.int64),  # Stamp of the plan that passed it over.
        ("stamp", np.int64),
        ("arrival_s", np.float64),
        ("since_s", np.float64),
        ("first_s", np.float64),
        ("end_s", np.float64),
        ("expected_service_s", np.float64),  # That it was predicted to take when it was sent.
        ("prompt_service_s", np.float64),  # Of that, for the prompt.
        ("token_service_s", np.float64),  # For each output token.
    ],
    align=True,
)

PAIR = np.dtype(
    [
        ("users", np.int32),
        ("decoding", np.int32),
        ("sent", np.int32),
        ("marked", np.int64),  # Step in which it was counted.
        ("previous", np.int32),
        ("next", np.int32),
        ("stamp", np.int64),
        ("resident", np.bool_),
        ("fetched_s", np.float64),  # When it lies in host memory; infinite: not asked for.
    ],
    align=True,
)
"""An adapter on a replica."""

TENANT = np.dtype(
    [
        ("counter", np.float64),  # Of service, but for decoding: that adds num_decoding * (cost of a token) per step.
        ("admitted", np.float64),  # Not paid yet: what those cost that steps planned and not done admitted.
        ("num_decoding", np.int64),
        ("num_active", np.int64),
        ("position", np.int64),
        ("active", np.int64),  # Not of this tenant: the tenant at this place of the replica's list of active ones.
    ],
    align=True,
)
"""A tenant on a replica."""

ACCOUNT = np.dtype(
    [
        ("seconds", np.float64),  # That it has had.
        ("expected", np.float64),  # Seconds for what is under way.
        ("num_active", np.int64),
        ("num_waiting", np.int64),
        ("waits_since", np.int64),  # The request with which its waiting began.
        ("position", np.int64),
        ("active", np.int64),  # Not of this tenant, as in TENANT.
    ]
)
"""A tenant of a base, in the router."""

SLOT = np.dtype(
    [
        ("running", np.int32),
        ("waiting", np.int32),
        ("prefilling", np.int32),  # In order of admission.
        ("fresh", np.int32),  # Adapters loaded since the router heard last.
        ("end_request", np.int64),  # A heap of the decoding requests by their last step.
        ("end_step", np.int64),
    ]
)
"""One place of each of a replica's lists."""

GROUP = np.dtype([("holder", np.int64), ("num_asked", np.int64), ("link_free_s", np.float64)])
"""``holder``: the replica that has the turn, or NONE."""
ADAPTER = np.dtype([("pages", np.int64), ("whole_bytes", np.float64), ("load_s", np.float64), ("fetch_s", np.float64)])
"""An adapter on a replica of one cost, as in ``AdapterTable``."""
CANDIDATE = np.dtype([("replica", np.int64), ("weight", np.float64), ("home", np.float64)])
"""``home``: the router's affinity of a cold adapter."""

VIEW = np.dtype(
    [
        ("queued", np.float64),
        ("prompts", np.float64),
        ("room", np.float64),
        ("step_s", np.float64),
        ("prefill_s", np.float64),
        ("row_s", np.float64),
        ("context_token_s", np.float64),
        ("token_s", np.float64),
        ("free_tokens", np.float64),
        ("max_step_tokens", np.float64),
        ("max_running", np.float64),
        ("key", np.uint64),
    ]
)
"""What the router knows of a replica: prompt tokens to compute, the prompts of all that are there, and the tokens for
which there were pages when it heard last; then its ``Rates``, and the hash of its id."""

CHUNK = np.dtype([("request", np.int64), ("start", np.int64), ("count", np.int64), ("admitted", np.float64)])
"""Prompt tokens of a request in a planned step; ``admitted``: what its tenant owes for the admission, 0 for later
chunks."""
PLAN = np.dtype(
    [
        ("size", np.int64),
        ("rows", np.float64),
        ("tokens", np.float64),
        ("pairs", np.float64),
        ("single_rows", np.float64),
        ("kv_tokens", np.float64),
        ("lora_tokens", np.float64),
        ("ready_s", np.float64),
        # Of a pipeline, where decode rows count in the sums above.
        ("num_rows", np.int64),
        ("latency_s", np.float64),
        ("interval_s", np.float64),
        ("end_s", np.float64),
    ]
)
"""The chunks of a planned step, summed; ``ready_s``: when the adapters that it loads are there."""
