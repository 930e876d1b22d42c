"""Commands beside the main job: sweeps, cost of a model, conversion, curves, likelihood, web page. python -m tools.NAME."""
