"""The load test: workload (seeded), client (timestamps only), stats (pure), report."""
