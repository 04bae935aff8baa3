"""One file per paper: its claims as data, and one function that measures them (see `steepest.studies._base`)."""
