"""`python -m mimo_fast` is the `mimo-fast` command."""

from mimo_fast.cli.main import main

raise SystemExit(main())
