"""`python -m mimo_fast` is the `mimo-fast` command."""

from .cli import main

raise SystemExit(main())
