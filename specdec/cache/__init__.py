"""KV-cache manager: where keys and values live, and how rejected ones are forgotten."""

from specdec.cache.kv_cache import MAX_ROWS, KVCache
from specdec.cache.stores import LayerStore, StoreShape

__all__ = ["MAX_ROWS", "KVCache", "LayerStore", "StoreShape"]
