"""Command lines: parsers that are made from the configs, and errors as one line. Imported by the commands alone."""
