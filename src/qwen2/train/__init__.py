"""Training: one loop for every job; a job is the batches and the loss that it hands in."""
