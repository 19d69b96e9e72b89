"""`python -m qwen2` is `qwen2`."""

import sys

from qwen2.cli.app import console

sys.exit(console())
