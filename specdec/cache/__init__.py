"""KV-cache manager: where keys and values live, how rejected ones are forgotten, and which ones are used again."""

from specdec.cache.conversation import CacheProvider, Conversation, MediaKey
from specdec.cache.kv_cache import MAX_ROWS, Companion, KVCache, RingCheckpoint
from specdec.cache.reuse import Conversations
from specdec.cache.stores import LayerStore, StoreShape

__all__ = [
    "MAX_ROWS",
    "CacheProvider",
    "Companion",
    "Conversation",
    "Conversations",
    "KVCache",
    "LayerStore",
    "MediaKey",
    "RingCheckpoint",
    "StoreShape",
]
