"""The command line: a small module per verb, imported when the verb runs."""
