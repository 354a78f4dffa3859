"""insitu: look inside large language models where they run.

from insitu import LanguageModel

model = LanguageModel("HuggingFaceTB/SmolLM2-135M-Instruct")
with model.trace("The Eiffel Tower is in the city of", remote=True):
    tokens = model.lm_head.output.argmax(dim=-1).save()
print(model.tokenizer.decode(tokens[0][-1]))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from insitu._config import CONFIG
from insitu_wire.errors import (
    AuthenticationError,
    CancelledError,
    CapacityError,
    ConfigurationError,
    DeadlineError,
    Error,
    InternalError,
    InterventionError,
    InvalidTraceError,
    LeaseLostError,
    NotFoundError,
    PermissionDeniedError,
    SessionStateError,
    UnavailableError,
    UnknownModuleError,
    ValueNotAvailableError,
    VersionError,
)

if TYPE_CHECKING:
    from insitu import optim
    from insitu._containers import dict, list, variable
    from insitu._envoy import Envoy
    from insitu._handle import Handle
    from insitu._lint import UnusedValueWarning
    from insitu._model import LanguageModel
    from insitu._module_model import Model
    from insitu._session import Session
    from insitu._submission import (
        SessionState,
        SessionSummary,
        Submission,
        attach,
        fetch,
        sessions,
    )
    from insitu._trace import Tracer

__all__ = [
    "CONFIG",
    "AuthenticationError",
    "CancelledError",
    "CapacityError",
    "ConfigurationError",
    "DeadlineError",
    "Envoy",
    "Error",
    "Handle",
    "InternalError",
    "InterventionError",
    "InvalidTraceError",
    "LanguageModel",
    "LeaseLostError",
    "Model",
    "NotFoundError",
    "PermissionDeniedError",
    "Session",
    "SessionState",
    "SessionStateError",
    "SessionSummary",
    "Submission",
    "Tracer",
    "UnavailableError",
    "UnknownModuleError",
    "UnusedValueWarning",
    "ValueNotAvailableError",
    "VersionError",
    "attach",
    "dict",
    "fetch",
    "list",
    "optim",
    "sessions",
    "variable",
]

# Imported at first use: these need torch, which takes seconds.
_LAZY = {
    "UnusedValueWarning": "insitu._lint",
    "dict": "insitu._containers",
    "list": "insitu._containers",
    "variable": "insitu._containers",
    "Envoy": "insitu._envoy",
    "Handle": "insitu._handle",
    "LanguageModel": "insitu._model",
    "Model": "insitu._module_model",
    "Session": "insitu._session",
    "SessionState": "insitu._submission",
    "SessionSummary": "insitu._submission",
    "Submission": "insitu._submission",
    "Tracer": "insitu._trace",
    "attach": "insitu._submission",
    "fetch": "insitu._submission",
    "sessions": "insitu._submission",
}


def __getattr__(name: str) -> object:
    if name == "optim":
        return import_module("insitu.optim")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'insitu' has no attribute {name!r}")
