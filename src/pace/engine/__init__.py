"""The engine: schedule, run, sample, commit, emit."""
