"""Supervised fine-tuning: its settings, the job, and what the model answers meanwhile."""
