"""``python -m compress_jax.cli``, where the console script is not installed."""

import sys

from compress_jax.cli import main

sys.exit(main())
