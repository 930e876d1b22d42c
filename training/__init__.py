"""Training: the update and its EMA, and the session around the loop (run folder, logs, signals, saving, resuming)."""
