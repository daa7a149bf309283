"""The sub-commands of `pace`, one per file: `add` describes its arguments, `run` carries it out."""
