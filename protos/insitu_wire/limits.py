"""Sizes that both ends of a connection must agree on, and the channel options that follow."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message that any server takes; what is larger is streamed in chunks."""

MAX_SESSION_BYTES = MAX_MESSAGE_BYTES - 64 * 1024
"""Largest session that a server takes by default; the rest of a message is for its envelope."""

CHUNK_BYTES = 1024 * 1024
"""Size of the chunks in which tensors and files are streamed."""

MIN_UPLOAD_BYTES = 64 * 1024
"""Size from which on a user's tensor is uploaded apart; smaller ones are inside the session."""

MAX_UPLOAD_BYTES = 4 * 1024**3
"""Largest tensor that can be uploaded."""

API_KEY_METADATA = "insitu-api-key"
"""Metadata key that carries a client's API key."""

ACCESS_TOKEN_METADATA = "insitu-access-token"
"""Metadata key of calls to a shard group: the token that it gave the scheduler."""

EPOCH_METADATA = "insitu-epoch"
"""Metadata key of a scheduler's calls: which lead of a deployment it is."""

JOIN_TOKEN_METADATA = "insitu-join-token"
"""Metadata key of registrations of shard groups: the token that all of a deployment share."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A watcher may wait for hours without traffic; these find a dead peer within two minutes.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A peer that is started again is found within seconds; gRPC would wait up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
    # Two servers on one port would share its calls silently.
    ("grpc.so_reuseport", 0),
)

MAX_TENSOR_BYTES = 4 * 1024**3
"""Size of the largest tensor that an operation of a session may make."""

MAX_NEW_TOKENS = 100_000
"""Most tokens that a generation may add to a row."""
