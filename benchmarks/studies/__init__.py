"""One-off studies: each answers a question about one machine, and docs/LOG.md has its answer."""
