"""One-off studies: each answers a question about one machine, and its answer stands in
docs/LOG.md."""
