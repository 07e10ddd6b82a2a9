"""``loraplex bench ...``: the engine alone, or a running server."""

import asyncio
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from loraplex.cli.bench_engine import engine_command, sweep_command
from loraplex.cli.connection import DEFAULT_KEY_FILE, JsonOption, KeyFileOption, KeyOption, UrlOption, load_targets
from loraplex.cli.load_output import LoadProgress, print_report, report_json, require_an_answer
from loraplex.cli.output import print_json
from loraplex.loadgen.closed_loop import run_closed_loop
from loraplex.loadgen.completion import CompletionClient, Sample
from loraplex.loadgen.config import Endpoint, RequestConfig
from loraplex.loadgen.http_client import HttpClient
from loraplex.loadgen.prompts import PromptMaker, TokenizerPrompts, WordPrompts
from loraplex.loadgen.report import summarize

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure the engine alone or a running server.")


app.command("engine")(engine_command)
app.command("sweep")(sweep_command)


@app.command("serve")
def serve(
    requests: Annotated[int, typer.Option(min=1, help="How many in all.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="How many at a time.")] = 8,
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Prompt tokens of each.")] = 128,
    output_tokens: Annotated[int, typer.Option("--output", min=1, help="Output tokens of each.")] = 64,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Take turns over these; default: all of the key file.")
    ] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="Which API.")] = Endpoint.COMPLETIONS,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Model directory whose tokenizer.json makes prompts exact to the token.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Answers of exactly --output tokens.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """A running server at a fixed number of requests in flight."""
    config = RequestConfig(endpoint=endpoint, ignore_eos=ignore_eos, timeout_s=timeout, seed=seed)
    base_url, targets = load_targets(url, key, demo_file, model or [])
    prompts: PromptMaker = WordPrompts(seed=seed) if tokenizer is None else TokenizerPrompts(tokenizer, seed=seed)
    settings = {
        "url": base_url,
        "requests": requests,
        "concurrency": concurrency,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "models": [target.model for target in targets],
        **msgspec.to_builtins(config),
    }

    async def run() -> list[Sample]:
        http = HttpClient(base_url, connect_timeout_s=config.connect_timeout_s)
        try:
            with LoadProgress(requests) as progress:
                return await run_closed_loop(
                    targets,
                    CompletionClient(http, config),
                    prompts,
                    num_requests=requests,
                    concurrency=concurrency,
                    prompt_tokens=input_tokens,
                    output_tokens=output_tokens,
                    on_sample=progress.on_sample,
                )
        finally:
            http.close()

    cpu_s = time.process_time()
    samples = asyncio.run(run())
    report = summarize(samples, client_cpu_s=time.process_time() - cpu_s)
    if as_json:
        print_json(report_json(report, (), settings))
    else:
        print_report(report)
    require_an_answer(report)
