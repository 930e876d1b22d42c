"""Checkpoints: the file format, written atomically and verified; what a file holds, opened once."""
