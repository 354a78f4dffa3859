"""The engine: runs a segment of a session on a model. Knows torch, but no network.

The shard service drives it on every rank of a group; the SDK's local backend drives it in process.
"""

from insitu_shard.engine.checkpoint import check_checkpoint
from insitu_shard.engine.describe import describe
from insitu_shard.engine.describe_module import describe_module
from insitu_shard.engine.devices import rank_device
from insitu_shard.engine.element_types import parse_dtype
from insitu_shard.engine.events import (
    Finished,
    Logged,
    Saved,
    SegmentEvent,
    StepFollows,
    TokensChosen,
    TraceStarted,
)
from insitu_shard.engine.explain import explain
from insitu_shard.engine.gguf import convert
from insitu_shard.engine.handles import Budgets, HandleStore, KeptValues, num_bytes
from insitu_shard.engine.loading import load_model
from insitu_shard.engine.model import LoadedModel
from insitu_shard.engine.model_folder import (
    load_config,
    resolve_model_folder,
    tokenizer_files,
    tokenizer_hash,
)
from insitu_shard.engine.module import LoadedModule
from insitu_shard.engine.pool import SegmentPool
from insitu_shard.engine.segment import SegmentRun
from insitu_shard.engine.spread import Spread
from insitu_shard.engine.tensor_plan import check_ranks, has_plan
from insitu_shard.engine.training import seen

__all__ = [
    "Budgets",
    "Finished",
    "HandleStore",
    "KeptValues",
    "LoadedModel",
    "LoadedModule",
    "Logged",
    "Saved",
    "SegmentEvent",
    "SegmentPool",
    "SegmentRun",
    "Spread",
    "StepFollows",
    "TokensChosen",
    "TraceStarted",
    "check_checkpoint",
    "check_ranks",
    "convert",
    "describe",
    "describe_module",
    "explain",
    "has_plan",
    "load_config",
    "load_model",
    "num_bytes",
    "parse_dtype",
    "rank_device",
    "resolve_model_folder",
    "seen",
    "tokenizer_files",
    "tokenizer_hash",
]
