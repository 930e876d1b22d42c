"""Training: the update and its EMA, and the run around it (folder, logs, signals, saving, resuming, watchers)."""
