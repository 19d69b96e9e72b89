"""The server: one engine behind the interfaces that people already use. `create_app` makes it; `qwen2 serve` runs it."""
