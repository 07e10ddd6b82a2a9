"""The program itself: fast help, lazy commands, one-line errors, exit codes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from loraplex.cli import lazy
from loraplex.cli.bench import Bench
from loraplex.cli.lazy import load_command
from loraplex.cli.main import Root
from loraplex.core.errors import Unavailable
from typer.testing import Result

Run = Callable[..., Result]
DATA = Path(__file__).parent / "data"


def _program(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'loraplex'; from loraplex.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def test_help_is_fast_and_imports_little() -> None:
    code = (
        "import sys, time; started = time.process_time()\n"
        "from loraplex.cli.main import main\n"
        "sys.argv = ['loraplex', '--help']\n"
        "try: main()\n"
        "except SystemExit as error: assert not error.code\n"
        "heavy = [name for name in ('torch', 'ray', 'pyarrow', 'httpx', 'numpy') if name in sys.modules]\n"
        "print('HEAVY', heavy, 'CPU', time.process_time() - started)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    last = result.stdout.splitlines()[-1].split()
    assert last[1] == "[]"
    assert float(last[-1]) < 0.7
    for name in ("status", "chat", "tenant", "key", "adapter", "trace", "replay", "bench", "serve"):
        assert name in result.stdout


def test_every_group_has_help(run: Run) -> None:
    for group in ("status", "chat", "tenant", "key", "adapter", "trace", "replay", "bench"):
        result = run(group, "--help")
        assert result.exit_code == 0, group
        assert "Usage" in result.output
    for words in (("bench", "engine"), ("adapter", "register"), ("tenant", "update"), ("trace", "stats")):
        assert run(*words, "--help").exit_code == 0, words


def test_entry_points_are_described_without_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other_commands.py").write_text(
        'import nothing_of_that_name\n\n\ndef fly() -> None:\n    """Fly away.\n\n    Far."""\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert lazy._described("other_commands:fly") == "Fly away."
    assert lazy._described("other_commands:other") == "From other_commands."
    assert lazy._described("nosuch_module:fly") == "From nosuch_module."
    assert "other_commands" not in sys.modules
    with pytest.raises(Unavailable, match="nothing_of_that_name"):
        load_command("fly", "other_commands:fly")


def test_an_entry_point_with_a_dot_belongs_to_that_group(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("bench.fly", "other:fly", lazy.ENTRY_POINT_GROUP), EntryPoint("walk", "other:walk", "any")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    program, bench = Root(name="loraplex"), Bench(name="bench")
    assert {"walk", "bench"} <= set(program.commands)
    assert not {"fly", "bench.fly"} & set(program.commands)
    assert set(bench.commands) == {"engine", "sweep", "fleet", "fly"}


def test_a_function_becomes_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "good_commands.py").write_text('def greet(name: str) -> None:\n    print(f"hello {name}")\n')
    monkeypatch.syspath_prepend(tmp_path)
    command = load_command("greet", "good_commands:greet")
    assert command.name == "greet"
    with pytest.raises(SystemExit) as ended:
        command(["you"])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("nosuch",), 2, "nosuch"),
        (("status", "--nosuch"), 2, "--nosuch"),
        (("status",), 2, ".loraplex/demo.json"),
        (("status", "--url", "http://127.0.0.1:9", "--key", "k"), 1, "127.0.0.1:9"),
        (("status", "--url", "ftp://x", "--key", "k"), 2, "ftp://x"),
        (("trace", "stats", "nosuch.parquet"), 1, "nosuch.parquet"),
        (("replay", "nosuch.parquet", "--url", "http://127.0.0.1:9", "--key", "k", "-m", "m"), 1, "nosuch.parquet"),
        (("replay", "x", "--url", "http://127.0.0.1:9", "--key", "k"), 2, "--model"),
        (("replay", "x", "--speed", "0"), 2, "speed"),
        (("replay", "x", "--out", "nosuch/dir/report.json"), 1, "nosuch/dir"),
        (("tenant", "create", "t", "--limit", "colour=3", "--url", "http://127.0.0.1:9", "--key", "k"), 2, "colour"),
    ],
)
def test_errors_name_the_thing(run: Run, arguments: tuple[str, ...], code: int, word: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert word in result.stderr
    assert "Traceback" not in result.output


def test_broken_key_file_is_named(run: Run, tmp_path: Path) -> None:
    for content in ("{", '{"http": 3}', '{"http": "http://x", "tenants": [{"name": "a"}]}'):
        (tmp_path / "keys.json").write_text(content)
        result = run("status", "--demo-file", "keys.json")
        assert result.exit_code == 2
        assert "keys.json" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_traceback_only_with_debug() -> None:
    plain = _program("trace", "stats", "/nosuch")
    assert (plain.returncode, plain.stderr) == (1, "error: no trace at /nosuch\n")
    debug = _program("--debug", "trace", "stats", "/nosuch")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


def test_environment_gives_address_and_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("LORAPLEX_API_KEY", "k")
    result = run("status")
    assert (result.exit_code, "127.0.0.1:9" in result.stderr) == (1, True)


def test_something_else_listens(run: Run) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        result = run("status", "--url", f"http://127.0.0.1:{server.server_port}", "--key", "k")
        thread.join()
    assert result.exit_code == 1
    assert "not a Loraplex server" in result.stderr


def test_trace_stats(run: Run) -> None:
    path = DATA / "lmsys_arena_200.parquet"
    text = run("trace", "stats", path, "--top", 2).stdout
    assert "200 requests" in text
    assert "arena-model-" in text
    stats = json.loads(run("trace", "stats", path, "--json").stdout)
    assert stats["requests"] == 200
    assert len(stats["by_tenant"]) == stats["tenants"]["distinct"]


def test_version() -> None:
    started_s = time.monotonic()
    assert _program("--version").stdout.startswith("loraplex 0")
    assert time.monotonic() - started_s < 20


def test_bench_engine(run: Run) -> None:
    options = ("--model", "random:tiny-llama", "--requests", 3, "--input", 8, "--output", 4, "--adapters", 2)
    result = run("bench", "engine", *options, "--rank", 8, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["options"]["load"]["lora_ranks"], report["result"]["output_tokens"]) == ([8], 12)
    more = (
        "--mixed-ranks",
        "8,16",
        "--modules",
        "q,k",
        "--popularity",
        "zipf",
        "--cold",
        "--single-ttft",
        2,
        "--profile",
        2,
    )
    text = run("bench", "engine", *options, *more, "--threads", 1).stdout
    for words in ("output tokens/s", " loads, ", "eta 0.", "cold adapter", "decode: 2 steps"):
        assert words in text, text
    for option, value in (("--modules", "x"), ("--mixed-ranks", "a"), ("--popularity", "z"), ("--ceilings", "z")):
        wrong = run("bench", "engine", *options, option, value)
        assert wrong.exit_code == 2, option
        assert f"'{value}'" in wrong.stderr
    on_cpu = run("bench", "engine", *options, "--batch-invariant")
    assert on_cpu.exit_code == 2
    assert "batch_invariant" in on_cpu.stderr
    unknown = run("bench", "engine", "--model", "random:nosuch")
    assert unknown.exit_code == 2
    assert "random:nosuch" in unknown.stderr


def test_bench_sweep(run: Run, tmp_path: Path) -> None:
    options = ("--model", "random:tiny-llama", "--threads", 1, "--shrink", 64, "--out", tmp_path / "sweep.json")
    result = run("bench", "sweep", *options, "--cases", "base,32-lora-32")
    assert result.exit_code == 0, result.output
    assert "32-lora-32" in result.stdout
    assert "eta" in result.stdout
    table = json.loads(run("bench", "sweep", *options, "--cases", "base,1-base", "--json").stdout)
    assert [row["case"] for row in table["rows"]] == ["base", "32-lora-32", "1-base"]
    unknown = run("bench", "sweep", *options, "--cases", "nosuch")
    assert unknown.exit_code == 2
    assert "many-2000-capped" in unknown.stderr
