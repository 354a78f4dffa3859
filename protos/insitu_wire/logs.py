"""How the programs write their logs: as text, or a JSON object a line."""

from __future__ import annotations

import datetime
import json
import logging
from enum import StrEnum


class LogFormat(StrEnum):
    """How lines of the log look."""

    TEXT = "text"
    JSON = "json"


def set_up_logging(log_format: LogFormat) -> None:
    """Has a program log to standard error."""
    handler = logging.StreamHandler()
    if log_format is LogFormat.JSON:
        handler.setFormatter(JsonFormatter())
    else:
        text = "%(asctime)s %(name)s %(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(text))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object; what `extra` gives it is a member of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Gives the line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _USUAL},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


# What every record has.
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
