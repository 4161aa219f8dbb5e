"""Write a classifier in the formats of other programs. Each has an input `crops` and an output `probabilities`.

In shapes, N is the number of crops and K the number of classes.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

Format = Literal["savedmodel", "onnx", "tflite"]
Quantize = Literal["none", "float16", "int8"]

ONNX_FILE = "model.onnx"
TFLITE_FILE = "model.tflite"
OPSET = 15  # of ONNX: onnxruntime 1.10 and later read it
# In int8, probabilities would be multiples of 1/256 that do not sum to 1, and the weighted average of `resnet` (a batch
# of matrix products) would change a third of its predictions.
NOT_IN_INT8 = ["SOFTMAX", "BATCH_MATMUL"]
INPUT, OUTPUT, LABEL = "crops", "probabilities", "label"

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Crops in, N x 80 x 80 x 1, 0..255; probabilities out, N x K."""


def in_float32(model: keras.Model) -> keras.Model:
    """Return the model with all layers computing in float32 and the output named `probabilities`.

    ONNX and LiteRT have no convolutions in bfloat16. The weights are float32 already.
    """
    copy = keras.Model.from_config(_with_float32(model.get_config()))
    copy.set_weights(model.get_weights())
    return keras.Model(copy.inputs[0], {OUTPUT: copy.output}, name=model.name)  # without a name, Keras would number it


def _with_float32(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _with_float32(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_with_float32(value) for value in config]
    return "float32" if config == "mixed_bfloat16" else config


def save_saved_model(model: keras.Model, class_names: Sequence[str], folder: Path) -> Predict:
    """Write `1/`: TensorFlow Serving expects a folder per version, named by its number.

    The signature has a second output, `label`: the name of the most probable class of each crop, (N,) strings.

    model: as `in_float32` returns it.
    """
    names = tf.constant(list(class_names))

    def serve(crops: Any) -> dict[str, Any]:
        probabilities = model(crops, training=False)[OUTPUT]
        return {OUTPUT: probabilities, LABEL: tf.gather(names, tf.argmax(probabilities, axis=1))}

    archive = keras.export.ExportArchive()  # tracks the variables itself; calling `track` would store them twice
    archive.add_endpoint("serve", serve, input_signature=_signature(model))
    archive.write_out(folder / "1", verbose=False)
    written = tf.saved_model.load(str(folder / "1"))  # referenced below: its functions do not keep variables alive
    return lambda crops: np.asarray(written.serve(crops)[OUTPUT])


def save_onnx(model: keras.Model, folder: Path) -> Predict:
    """Write `model.onnx`. model: as `in_float32` returns it."""
    import onnx
    import onnxruntime

    file = folder / ONNX_FILE
    with warnings.catch_warnings():
        # Keras patches tf2onnx, which has no release for NumPy 2 (github.com/onnx/tensorflow-onnx/issues/2373).
        warnings.filterwarnings("ignore", "In the future `np.object`", FutureWarning)
        model.export(file, format="onnx", input_signature=_signature(model), opset_version=OPSET, verbose=False)
    onnx.checker.check_model(file, full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda crops: np.asarray(session.run([OUTPUT], {INPUT: crops})[0])


def save_tflite(
    model: keras.Model, folder: Path, quantize: Quantize = "none", calibration: NDArray[np.float32] | None = None
) -> Predict:
    """Write `model.tflite` for LiteRT. model: as `in_float32` returns it.

    Args:
        quantize: `none`; `float16`: weights; `int8`: weights and activations, except those of `NOT_IN_INT8`.
        calibration: crops to find the ranges of activations for `int8`, N x 80 x 80 x 1.
    """
    file = folder / TFLITE_FILE
    with warnings.catch_warnings():
        # Once TensorFlow drops it, ai-edge-litert is needed (ai.google.dev/edge/litert/migration).
        warnings.filterwarnings("ignore", r"\s*Warning: tf\.lite\.Interpreter is deprecated", UserWarning)
        if quantize == "int8":
            assert calibration is not None
            file.write_bytes(_in_int8(model, calibration))
        else:
            half = {"optimizations": [tf.lite.Optimize.DEFAULT], "target_spec": {"supported_types": [tf.float16]}}
            settings = half if quantize == "float16" else {}
            model.export(file, format="litert", input_signature=_signature(model), verbose=False, **settings)
        interpreter = tf.lite.Interpreter(str(file), num_threads=os.cpu_count())
    interpreter.allocate_tensors()  # prints which kernels it uses; here, this is not among the results
    run = interpreter.get_signature_runner()
    return lambda crops: np.asarray(run(**{INPUT: crops})[OUTPUT])


def _in_int8(model: keras.Model, calibration: NDArray[np.float32]) -> bytes:
    """Return a tflite whose convolutions and dense layers compute in int8. Its input and output are float32.

    `NOT_IN_INT8` stays float32. Keras' export has no setting for this, so it is done as in
    ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_debugger.
    """

    def crops() -> Iterator[list[NDArray[np.float32]]]:
        return ([calibration[row : row + 1]] for row in range(len(calibration)))

    with tempfile.TemporaryDirectory() as saved:
        model.export(saved, format="tf_saved_model", input_signature=_signature(model), verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(saved)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = crops
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.lite.OpsSet.TFLITE_BUILTINS]
        options = tf.lite.experimental.QuantizationDebugOptions(denylisted_ops=NOT_IN_INT8)
        debugger = tf.lite.experimental.QuantizationDebugger(
            converter=converter, debug_dataset=crops, debug_options=options
        )
        return bytes(debugger.get_nondebug_quantized_model())


def _signature(model: keras.Model) -> list[Any]:
    height, width = model.input_shape[1:3]
    return [tf.TensorSpec((None, height, width, 1), tf.float32, name=INPUT)]
