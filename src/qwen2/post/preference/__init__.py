"""Preference training (DPO and its variants): prompts with two answers, the losses, the reference's numbers, the job."""
