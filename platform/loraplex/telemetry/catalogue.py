"""Every metric of the platform, named once. Who counts takes the spec from here; dashboards, alerts and the table of
``docs/telemetry.md`` are checked against it.

All are exposed by gateways (``GET /metrics``): replicas and the controller tell gateways what they know. Label sets are
bounded: tenants have counters alone, adapters the busiest only, and what has no label of its own is in ``other``.
"""

from loraplex.telemetry.metric import Label, MetricSpec

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)

ENDPOINT = Label(name="endpoint", values="`chat.completions`, `completions`, `grpc.generate`", max_values=3)
STATUS = Label(
    name="status", values="HTTP status; of gRPC the one that it maps to; 499: the client left", max_values=16
)
KIND = Label(name="kind", values="`prompt`, `cached` (part of prompt), `output`", max_values=3)
CALL = Label(
    name="call",
    values="the controller's method: `snapshot`, `lease_quota`, `report_usage`, `fleet_status`",
    max_values=4,
)
TENANT = Label(
    name="tenant", values="the first `telemetry.max_tenants` tenants that send requests, then `other`", max_values=101
)
OUTCOME = Label(
    name="outcome", values="`ok`, `limited` (429), `client_error`, `client_gone` (499), `failed` (5xx)", max_values=5
)
ADAPTER = Label(
    name="adapter", values="the `telemetry.max_adapters` with the most requests lately, then `other`", max_values=21
)
ADAPTER_TENANT = Label(name="tenant", values="the adapter's tenant; `other` for `other`", max_values=21)
REPLICA = Label(name="replica", values="replicas that are connected", max_values=64)
BASE_MODEL = Label(name="base_model", values="its base model", max_values=64)
GROUP = Label(name="group", values="its group", max_values=64)
GPU = Label(name="gpu", values="its GPU type", max_values=64)
ROWS = Label(name="outcome", values="`sent`, `dropped` (buffer full), `refused` (invalid)", max_values=3)
STORE = Label(name="state", values="`written`, `buffered`, `dropped` (files cannot be written)", max_values=3)
GROUP_STATE = Label(name="state", values="`serving`, `starting`, `waiting`, `left out`, `leaving`", max_values=5)
DECISION = Label(
    name="kind", values="kind of decision: `applied`, `proposed`, `kept`, `reassigned`, ...", max_values=11
)
WHEN = Label(name="when", values="`before`, `after`", max_values=2)

# Requests and calls at this gateway.
REQUESTS = MetricSpec(
    name="loraplex_gateway_requests_total",
    kind="counter",
    unit="requests",
    help="Generation requests that have ended.",
    labels=(ENDPOINT, STATUS),
)
TOKENS = MetricSpec(
    name="loraplex_gateway_tokens_total",
    kind="counter",
    unit="tokens",
    help="Tokens of the generation requests that have ended.",
    labels=(KIND,),
)
RUNNING = MetricSpec(
    name="loraplex_gateway_running_requests",
    kind="gauge",
    unit="requests",
    help="Generation requests in flight.",
)
QUEUED = MetricSpec(
    name="loraplex_gateway_queued_generations",
    kind="gauge",
    unit="generations",
    help="Generations that wait in this gateway for a replica that takes them.",
)
READY = MetricSpec(
    name="loraplex_gateway_ready",
    kind="gauge",
    unit="0 or 1",
    help="1 when this gateway can serve: it has a snapshot, a quota lease and a replica.",
)
TTFT = MetricSpec(
    name="loraplex_gateway_ttft_seconds",
    kind="histogram",
    unit="seconds",
    help="Arrival to first token.",
    labels=(ENDPOINT,),
    buckets=_LATENCY_S,
)
TPOT = MetricSpec(
    name="loraplex_gateway_tpot_seconds",
    kind="histogram",
    unit="seconds",
    help="Mean time per output token after the first.",
    labels=(ENDPOINT,),
    buckets=_TOKEN_S,
)
E2E = MetricSpec(
    name="loraplex_gateway_e2e_seconds",
    kind="histogram",
    unit="seconds",
    help="Arrival to the end of the answer.",
    labels=(ENDPOINT,),
    buckets=_LATENCY_S,
)
REFUSED = MetricSpec(
    name="loraplex_gateway_refused_calls_total",
    kind="counter",
    unit="calls",
    help="Calls of any kind that ended in an error.",
    labels=(STATUS,),
)
CONTROL_ERRORS = MetricSpec(
    name="loraplex_gateway_control_errors_total",
    kind="counter",
    unit="calls",
    help="Failed calls to the controller.",
    labels=(CALL,),
)
STALE_SNAPSHOTS = MetricSpec(
    name="loraplex_gateway_stale_snapshots_total",
    kind="counter",
    unit="snapshots",
    help="Snapshots of an older epoch that were refused.",
)
SNAPSHOT_EPOCH = MetricSpec(
    name="loraplex_snapshot_epoch",
    kind="gauge",
    unit="epoch",
    help="Epoch of the snapshot in use: each controller has its own.",
)
SNAPSHOT_VERSION = MetricSpec(
    name="loraplex_snapshot_version",
    kind="gauge",
    unit="version",
    help="Version of the snapshot within its epoch.",
)

# Tenants and adapters.
TENANT_REQUESTS = MetricSpec(
    name="loraplex_tenant_requests_total",
    kind="counter",
    unit="requests",
    help="Generation requests of a tenant that have ended.",
    labels=(TENANT, OUTCOME),
)
TENANT_TOKENS = MetricSpec(
    name="loraplex_tenant_tokens_total",
    kind="counter",
    unit="tokens",
    help="Tokens of a tenant's requests.",
    labels=(TENANT, KIND),
)
ADAPTER_REQUESTS = MetricSpec(
    name="loraplex_adapter_requests_total",
    kind="counter",
    unit="requests",
    help="Generation requests of an adapter that have ended.",
    labels=(ADAPTER_TENANT, ADAPTER, OUTCOME),
)
ADAPTER_OUTPUT_TOKENS = MetricSpec(
    name="loraplex_adapter_output_tokens_total",
    kind="counter",
    unit="tokens",
    help="Tokens that an adapter generated.",
    labels=(ADAPTER_TENANT, ADAPTER),
)
ADAPTER_TTFT = MetricSpec(
    name="loraplex_adapter_ttft_seconds",
    kind="summary",
    unit="seconds",
    help="Arrival to first token of an adapter's requests.",
    labels=(ADAPTER_TENANT, ADAPTER),
)

# Engines, as their replicas reported last.
REPLICA_INFO = MetricSpec(
    name="loraplex_replica_info",
    kind="gauge",
    unit="1",
    help="What a replica is; always 1.",
    labels=(REPLICA, BASE_MODEL, GROUP, GPU),
)
REPLICA_RUNNING = MetricSpec(
    name="loraplex_replica_running_requests",
    kind="gauge",
    unit="requests",
    help="Requests in the running batch.",
    labels=(REPLICA,),
)
REPLICA_WAITING = MetricSpec(
    name="loraplex_replica_waiting_requests",
    kind="gauge",
    unit="requests",
    help="Requests that wait in the replica.",
    labels=(REPLICA,),
)
REPLICA_QUEUED_TOKENS = MetricSpec(
    name="loraplex_replica_queued_tokens",
    kind="gauge",
    unit="tokens",
    help="Prompt tokens not yet prefilled.",
    labels=(REPLICA,),
)
REPLICA_PAGES = MetricSpec(
    name="loraplex_replica_pages",
    kind="gauge",
    unit="pages",
    help="Pages of the arena.",
    labels=(REPLICA,),
)
REPLICA_FREE_PAGES = MetricSpec(
    name="loraplex_replica_free_pages",
    kind="gauge",
    unit="pages",
    help="Pages that are free or reclaimable at once.",
    labels=(REPLICA,),
)
REPLICA_RESIDENT_ADAPTERS = MetricSpec(
    name="loraplex_replica_resident_adapters",
    kind="gauge",
    unit="adapters",
    help="Adapters on the accelerator.",
    labels=(REPLICA,),
)
REPLICA_STEPS = MetricSpec(
    name="loraplex_replica_steps_total",
    kind="counter",
    unit="steps",
    help="Steps that have ended.",
    labels=(REPLICA,),
)
REPLICA_BUSY = MetricSpec(
    name="loraplex_replica_busy_seconds_total",
    kind="counter",
    unit="seconds",
    help="Time spent in steps; of several in flight each counts.",
    labels=(REPLICA,),
)
REPLICA_GENERATED_TOKENS = MetricSpec(
    name="loraplex_replica_generated_tokens_total",
    kind="counter",
    unit="tokens",
    help="Output tokens.",
    labels=(REPLICA,),
)
REPLICA_CACHED_TOKENS = MetricSpec(
    name="loraplex_replica_cached_tokens_total",
    kind="counter",
    unit="tokens",
    help="Prompt tokens that were found in the prefix cache.",
    labels=(REPLICA,),
)
REPLICA_PREEMPTIONS = MetricSpec(
    name="loraplex_replica_preemptions_total",
    kind="counter",
    unit="requests",
    help="Running requests that gave their pages to others and were computed again later.",
    labels=(REPLICA,),
)
REPLICA_ADAPTER_LOADS = MetricSpec(
    name="loraplex_replica_adapter_loads_total",
    kind="counter",
    unit="adapters",
    help="Copies of adapters to the accelerator that a request waited for.",
    labels=(REPLICA,),
)
REPLICA_ADAPTER_PREFETCHES = MetricSpec(
    name="loraplex_replica_adapter_prefetches_total",
    kind="counter",
    unit="adapters",
    help="Copies of adapters begun before their request's turn.",
    labels=(REPLICA,),
)
REPLICA_ADAPTER_HITS = MetricSpec(
    name="loraplex_replica_adapter_hits_total",
    kind="counter",
    unit="requests",
    help="Admissions that found their adapter on the accelerator.",
    labels=(REPLICA,),
)

# Fleet and planner, as the controller told last.
PLAN_VERSION = MetricSpec(
    name="loraplex_plan_version",
    kind="gauge",
    unit="version",
    help="Plan in force; 0: the config's own.",
)
PLAN_SETTLED = MetricSpec(
    name="loraplex_plan_settled",
    kind="gauge",
    unit="0 or 1",
    help="1 when the cluster is as the plan in force says.",
)
FLEET_PROBLEM = MetricSpec(
    name="loraplex_fleet_problem",
    kind="gauge",
    unit="0 or 1",
    help="1 when the controller can move nothing at the moment; `loraplex plan status` says why.",
)
FLEET_GROUPS = MetricSpec(
    name="loraplex_fleet_groups",
    kind="gauge",
    unit="groups",
    help="Groups by how far they are.",
    labels=(GROUP_STATE,),
)
FLEET_ATTAINMENT = MetricSpec(
    name="loraplex_fleet_attainment_ratio",
    kind="gauge",
    unit="share",
    help="Share of the requests of the planning window that met all targets; absent without requests.",
)
PLANNER_DECISIONS = MetricSpec(
    name="loraplex_planner_decisions_total",
    kind="counter",
    unit="decisions",
    help="Decisions about plans since this gateway started.",
    labels=(DECISION,),
)
PLANNER_ATTAINMENT = MetricSpec(
    name="loraplex_planner_attainment_ratio",
    kind="gauge",
    unit="share",
    help="Attainment measured before and after the newest decision for which it was measured.",
    labels=(WHEN,),
)
PLANNER_GAIN = MetricSpec(
    name="loraplex_planner_predicted_gain_ratio",
    kind="gauge",
    unit="share",
    help="Attainment that the planner expected to win by the newest decision that tells, its move paid.",
)

# Traces.
TRACE_ROWS = MetricSpec(
    name="loraplex_trace_recorder_rows_total",
    kind="counter",
    unit="rows",
    help="Trace rows that left this gateway's buffer.",
    labels=(ROWS,),
)
TRACE_BUFFERED = MetricSpec(
    name="loraplex_trace_recorder_buffered_rows",
    kind="gauge",
    unit="rows",
    help="Trace rows not yet delivered.",
)
TRACE_FAILED_SENDS = MetricSpec(
    name="loraplex_trace_recorder_failed_sends_total",
    kind="counter",
    unit="deliveries",
    help="Deliveries of trace rows that were repeated.",
)
TRACE_STORE = MetricSpec(
    name="loraplex_trace_store_rows",
    kind="gauge",
    unit="rows",
    help="Trace rows of all gateways in the controller since it started, as this gateway last heard.",
    labels=(STORE,),
)

CATALOGUE: tuple[MetricSpec, ...] = tuple(value for value in globals().values() if isinstance(value, MetricSpec))
"""In the order above."""
