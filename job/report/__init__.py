"""Reports in HTML of datasets and models."""
