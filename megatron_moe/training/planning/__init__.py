"""Planning a layout before a run: what every valid one needs in memory and takes in time. Imports no torch."""
