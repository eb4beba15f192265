"""Where a model runs (placements) and how its replicas agree (update rules, through communicators), independently."""
