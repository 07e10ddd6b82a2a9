"""Set-up of logging for a process: one line per record, JSON or plain, with the request id that is being served.

Prompts and keys are never logged; as a second line of defence the formatter blanks everything that looks like a key.
"""

import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

import msgspec

from loraplex.telemetry.config import LogConfig

request_id_var: ContextVar[str | None] = ContextVar("loraplex_request_id", default=None)
"""Set by the gateway's edge for each call; copied into tasks that the call starts."""

_KEY_LIKE = re.compile(r"\blpx_[A-Za-z0-9_-]{8,}|(?i:\bbearer\s+)[^\s'\",;]+")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "request_id"}


def redact(text: str) -> str:
    """``text`` with API keys and bearer tokens replaced by ``[redacted]``."""
    return _KEY_LIKE.sub("[redacted]", text)


class _RequestIdFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id_var.get()
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object per line; ``extra`` fields of the record become keys."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = getattr(record, "request_id", None)
        if request_id is not None:
            entry["request_id"] = request_id
        entry.update({key: value for key, value in record.__dict__.items() if key not in _STANDARD})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return redact(msgspec.json.encode(entry, enc_hook=str).decode())


class PlainFormatter(logging.Formatter):
    """For terminals: time, level, logger, message, request id when there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
        request_id = getattr(record, "request_id", None)
        suffix = f" [{request_id}]" if request_id else ""
        line = f"{time} {record.levelname.lower()} {record.name}: {record.getMessage()}{suffix}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return redact(line)


def configure_logging(config: LogConfig | None = None, *, stream: TextIO | None = None) -> None:
    """Sends the records of all ``loraplex`` loggers to ``stream`` (standard error by default). Idempotent: a second
    call replaces the first. Loggers of libraries are left alone."""
    config = config or LogConfig()
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if config.json else PlainFormatter())
    handler.addFilter(_RequestIdFilter())
    for name in ("loraplex", "loraplex_deployments"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(config.level)
        logger.propagate = False
