"""The engine: everything that makes text, scores or embeddings out of a model goes through its `step()`."""
