"""Distances between sets of images: feature networks, metrics, FID during training; likelihood."""
