"""From a dataset folder to a model folder, and the command line. Imports `cluster` and `preprocessing`."""

import os

# A user's ~/.keras/keras.json may name another backend; set before anything imports keras, in workers too.
os.environ["KERAS_BACKEND"] = "tensorflow"
