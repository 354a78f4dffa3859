"""The engine: runs a segment of a session on a model. Knows torch, but no network.

The shard service drives it on every rank of a group; the SDK's local backend drives it in process.
"""

from insitu_shard.engine.describe import describe
from insitu_shard.engine.events import Logged, Saved, SegmentEvent, TraceStarted
from insitu_shard.engine.handles import HandleStore
from insitu_shard.engine.model import (
    LoadedModel,
    load_config,
    load_model,
    resolve_model_folder,
)
from insitu_shard.engine.segment import SegmentRun

__all__ = [
    "HandleStore",
    "LoadedModel",
    "Logged",
    "Saved",
    "SegmentEvent",
    "SegmentRun",
    "TraceStarted",
    "describe",
    "load_config",
    "load_model",
    "resolve_model_folder",
]
