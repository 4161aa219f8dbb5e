"""A cloud for the tests: a strict bucket, and a small fake of Google Cloud with hosts of its own."""
