"""compute-sanitizer over the steps of a tiny model with adapters: ``python -m loraplex.bench.sanitize``.

Runs memcheck and racecheck, each with captured decode graphs and without, over prefill, mixed and decode steps with
base rows and adapters of several ranks that are loaded and evicted meanwhile. Prints one line a run with the number of
errors; exits with 1 when there is any, or when a run did not end. Needs a CUDA device and compute-sanitizer.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import time

from loraplex.bench.random_adapters import random_manifests
from loraplex.core.adapter import AdapterRef
from loraplex.core.clock import SystemClock
from loraplex.core.ids import BaseModelId, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, SamplingParams
from loraplex.engine import Engine, EngineConfig
from loraplex.model_runner import ExecutorConfig, build_executor
from loraplex.replica.driver import StepDriver

_BASE = BaseModelId("sanitize")
_TENANT = TenantName("sanitize")
_STEP_TOKENS = {"memcheck": 1200, "racecheck": 64}
"""Of the largest step: those of 1,200 tokens meet all sizes of LoRA tiles. Racecheck without graphs fills the host's
memory with them: 1 GB a second."""
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def run_steps(*, graphs: bool, step_tokens: int) -> None:
    """The load that is watched, in this process."""
    # Pages so small that adapters are cut, and arena so small that they are evicted.
    config = ExecutorConfig(
        device="cuda",
        dtype="bfloat16",
        page_size=16,
        num_pages=92 + step_tokens // 16,
        max_rows=6,
        max_step_tokens=step_tokens,
        cuda_graphs=graphs,
    )
    executor = build_executor(config, model="random:tiny-llama", base_model_id=_BASE)
    model = executor.model
    engine = Engine(EngineConfig(max_running=6, max_step_tokens=step_tokens), model=model, arena=executor.arena)
    driver = StepDriver(engine, executor, clock=SystemClock(), unstage=executor.unstage_adapter)
    adapters = random_manifests(model, count=6, lora_ranks=(8, 16, 80))
    for seed, manifest in enumerate(adapters):
        executor.stage_random_adapter(manifest, seed)
        engine.adapter_staged(manifest.digest, executor.adapter_pages(manifest), 0.0)
    source = random.Random(0)
    longest = max(40, step_tokens // 3)
    for index in range(12):
        manifest = adapters[index % 6]
        ref = AdapterRef(tenant=_TENANT, name="a", version=1, digest=manifest.digest) if index % 4 else None
        engine.add(
            EngineRequest(
                request_id=RequestId(f"r{index}"),
                tenant=_TENANT,
                base_model_id=_BASE,
                adapter=ref,
                prompt_token_ids=tuple(source.randrange(model.vocab_size) for _ in range(source.randrange(1, longest))),
                sampling=SamplingParams(
                    max_tokens=5, seed=index, ignore_eos=True, temperature=float(index % 2), top_k=5 if index % 3 else 0
                ),
                arrival_s=float(index),
                cache_salt="",
            ),
            0.0,
        )
    while engine.num_unfinished:
        for output in driver.step().outputs:
            assert output.finish_reason is not FinishReason.ERROR, output.error
    while driver.step().progressed:
        pass
    report = engine.load_report()
    executor.close()
    print(f"STEPS {report.steps} LOADS {report.adapter_loads + report.adapter_prefetches}")


def sanitize(tool: str, *, graphs: bool, timeout_s: float) -> bool:
    """Prints a line; True when the run ended without an error."""
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--print-limit",
        "5",
        sys.executable,
        "-m",
        "loraplex.bench.sanitize",
    ]
    environment = dict(os.environ)
    if tool == "memcheck" and not graphs:
        # Every tensor an allocation of its own, so that an access just past its end is seen; graphs need the pool.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    started_s = time.monotonic()
    try:
        done = subprocess.run(
            [*command, "--steps", str(_STEP_TOKENS[tool]), *(["--graphs"] if graphs else [])],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        output = ""
    summary, steps = _SUMMARY.search(output), re.search(r"STEPS \d+ LOADS \d+", output)
    count = None if summary is None else int(next(group for group in summary.groups() if group is not None))
    what = steps.group() if steps else "the steps did not end"
    print(
        f"{tool} graphs={'on' if graphs else 'off'}: {'no summary' if count is None else f'{count} errors'}, {what}, "
        f"{time.monotonic() - started_s:.0f} s",
        flush=True,
    )
    if count != 0 or steps is None:
        print(output[-4000:])
    return count == 0 and steps is not None


def main() -> None:
    parser = argparse.ArgumentParser(description="compute-sanitizer over a tiny model's steps with adapters.")
    parser.add_argument("--tools", nargs="+", choices=_STEP_TOKENS, default=_STEP_TOKENS)
    parser.add_argument("--timeout-s", type=float, default=300.0, help="of each run")
    parser.add_argument(
        "--steps", type=int, metavar="TOKENS", help="run the watched load itself, without the sanitizer, in such steps"
    )
    parser.add_argument("--graphs", action="store_true", help="of --steps")
    arguments = parser.parse_args()
    if arguments.steps:
        run_steps(graphs=arguments.graphs, step_tokens=arguments.steps)
        return
    runs = [
        sanitize(tool, graphs=graphs, timeout_s=arguments.timeout_s)
        for tool in arguments.tools
        for graphs in (False, True)
    ]
    sys.exit(0 if all(runs) else 1)


if __name__ == "__main__":
    main()
