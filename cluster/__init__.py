"""Where the work runs and where the bytes live. Imports neither `preprocessing` nor `job`."""
