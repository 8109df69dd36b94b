"""The `quire` command: run, serve, plan, bench, version."""
