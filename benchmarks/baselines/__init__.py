"""What a user would run instead: transformers' own Qwen2 modules put together as upstream does, on
the same weights."""
