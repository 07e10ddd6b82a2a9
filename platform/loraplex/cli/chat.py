"""``loraplex chat``: one message and its answer, or a conversation on the terminal."""

import sys
from typing import Annotated, Any

import typer

from loraplex.cli.api import Api
from loraplex.cli.connection import (
    DEFAULT_KEY_FILE,
    KeyFileOption,
    KeyOption,
    TenantOption,
    UrlOption,
    tenant_connection,
)
from loraplex.core.errors import LoraplexError, NotFound

_HELP = "/model NAME changes the model, /models lists them, /new forgets the conversation, /quit or Ctrl-D ends it."


def chat_command(
    message: Annotated[str | None, typer.Argument(help="Without it: standard input, or a conversation.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the base model.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    tenant: TenantOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
) -> None:
    """Talk to a model: one message, or a conversation."""
    api = Api(tenant_connection(url, key, demo_file, tenant))
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    if seed is not None:
        settings["seed"] = seed
    if message is None and not _is_terminal():
        message = sys.stdin.read()
    conversation = Conversation(api, model or _models(api)[0], system, settings)
    if message is not None:
        conversation.say(message)
    else:
        conversation.run()


class Conversation:
    """Holds the messages so far."""

    def __init__(self, api: Api, model: str, system: str | None, settings: dict[str, Any]) -> None:
        self._api = api
        self._model = model
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._settings = settings
        self._messages: list[dict[str, str]] = list(self._opening)

    def say(self, text: str) -> None:
        """Sends one message and prints the answer as it comes. After an error the message is forgotten."""
        self._messages.append({"role": "user", "content": text})
        body = {"model": self._model, "messages": self._messages, "stream": True, **self._settings}
        answer = ""
        try:
            for chunk in self._api.stream("/chat/completions", body):
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content") or ""
                    answer += piece
                    typer.echo(piece, nl=False)
        except BaseException:
            self._messages.pop()
            if answer:
                typer.echo()
            raise
        typer.echo()
        self._messages.append({"role": "assistant", "content": answer})

    def run(self) -> None:
        """Reads messages from the terminal until the end. Errors and Ctrl-C end an answer, not the conversation."""
        typer.echo(f"Talking to {self._model}. {_HELP}")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                typer.echo()
                return
            if line == "/quit":
                return
            if not line:
                continue
            try:
                self._command(line) if line.startswith("/") else self.say(line)
            except LoraplexError as error:
                typer.echo(f"error: {error.message}", err=True)
            except KeyboardInterrupt:
                typer.echo("(stopped)")

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name == "/models":
            typer.echo("\n".join(_models(self._api)))
        elif name == "/new":
            self._messages = list(self._opening)
        elif name == "/model" and argument.strip():
            known = _models(self._api)
            if argument.strip() not in known:
                raise NotFound(f"no model {argument.strip()}; there are {', '.join(known)}")
            self._model = argument.strip()
        else:
            typer.echo(_HELP)


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _models(api: Api) -> list[str]:
    models = [model["id"] for model in api.get("/models")["data"]]
    if not models:
        raise NotFound("the server lists no model for this key")
    return models
