"""Ray, storage and manifests. Imports neither `preprocessing` nor `job`."""
