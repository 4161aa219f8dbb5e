"""The card of an export: its files, input and output, how to run it, and its accuracy."""

from typing import TYPE_CHECKING

from upath import UPath

from cluster.manifest import read_manifest
from cluster.models import ModelManifest
from job.model.folder import LABELS_FILE, TrainedOn
from preprocessing.card import front_matter, license_line

if TYPE_CHECKING:
    from job.export.export import Accuracy
    from job.export.formats import Format, Quantize

CARD_FILE = "README.md"

FILES = {
    "savedmodel": "`1/`: a SavedModel, version 1 of the model for TensorFlow Serving",
    "onnx": "`model.onnx`: ONNX, opset 15 (onnxruntime 1.10 and later)",
    "tflite": "`model.tflite`: for LiteRT (TensorFlow Lite)",
}
COMPUTES = {
    "none": "It computes in float32, even if the model was trained in mixed_bfloat16.",
    "float16": "Its weights are float16; it computes in float32.",
    "int8": "Convolutions and dense layers compute in int8, the rest in float32.",
}
RUN = {
    "savedmodel": """import numpy as np
import tensorflow as tf

crops = np.zeros((1, 80, 80, 1), np.float32)
served = tf.saved_model.load("1").signatures["serving_default"](crops=tf.constant(crops))
print(served["label"].numpy()[0].decode(), served["probabilities"].numpy().max())""",
    "onnx": """from pathlib import Path

import numpy as np
import onnxruntime

crops = np.zeros((1, 80, 80, 1), np.float32)
(probabilities,) = onnxruntime.InferenceSession("model.onnx").run(["probabilities"], {"crops": crops})
print(Path("labels.txt").read_text().split()[probabilities[0].argmax()], probabilities.max())""",
    "tflite": """from pathlib import Path

import numpy as np
import tensorflow as tf

crops = np.zeros((1, 80, 80, 1), np.float32)
interpreter = tf.lite.Interpreter("model.tflite")  # or ai_edge_litert.interpreter.Interpreter, without TensorFlow
probabilities = interpreter.get_signature_runner()(crops=crops)["probabilities"]
print(Path("labels.txt").read_text().split()[probabilities[0].argmax()], probabilities.max())""",
}


def export_card(
    folder: UPath,
    trained_on: TrainedOn,
    form: "Format",
    quantize: "Quantize",
    accuracy: "Accuracy | None",
    input_shape: tuple[int | None, ...],
    classes: int,
) -> str:
    """Return the `README.md` of an export, in Markdown. folder, trained_on: those of the model."""
    margin = f" --margin {trained_on.margin:g}" if trained_on.margin else ""
    any_size = "" if input_shape[1] else " It accepts any height and width."
    label = (
        " `label`: N strings, the names of their most probable classes, as in `labels.txt`."
        if form == "savedmodel"
        else ""
    )
    head = {"library_name": form, "pipeline_tag": "image-classification"}
    return f"""{front_matter(trained_on.license, head)}
# `{folder.parent.name}/{folder.name}` as {form}

Written by `kuzushiji export` from a model folder whose manifest has the SHA-256
`{read_manifest(folder, ModelManifest).sha256}`.

{_accuracy_table(accuracy)}
- {FILES[form]}.
- {COMPUTES[quantize]}
- `{LABELS_FILE}`: the {classes} classes, one per line, in the order of the probabilities.
- Input `crops`: N x 80 x 80 x 1 float32, 0 to 255: crops as `kuzushiji prepare{margin}` cuts
  them. The model scales them itself.{any_size}
- Output `probabilities`: N x {classes} float32.{label}
{license_line(trained_on.license)}

```python
{RUN[form]}
```
"""


def _accuracy_table(accuracy: "Accuracy | None") -> str:
    if accuracy is None:
        return "Its accuracy was not measured: `--dataset` was not given.\n"
    return f"""| {accuracy.split}, {accuracy.crops:,} crops | accuracy |
|---|---|
| the model | {accuracy.of_model:.4f} |
| this export | {accuracy.of_export:.4f} |

Both predict the same class for {accuracy.same:.2%} of the crops.
"""
