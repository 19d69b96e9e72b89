"""Training: the loop, what goes into it and what is reported of it."""
