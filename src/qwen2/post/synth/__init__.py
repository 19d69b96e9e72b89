"""Data that models make: answers sampled and checked, and problems whose answers are known."""
