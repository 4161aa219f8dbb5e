"""Save `model.keras` so that any Keras from 3.4 on loads it.

Keras writes all settings of a layer, also those at their defaults, and rejects settings that it does not know. So an
older version loads the file of a newer one only without the settings that were added in between.
"""

import json
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras

OLDEST_KERAS = "3.4"
CONFIG_MEMBER = "config.json"

# Settings that were added after `OLDEST_KERAS`, with their defaults.
LATER: dict[str, Any] = {
    "ragged": False,  # 3.9, github.com/keras-team/keras/pull/20757
    "quantization_config": None,  # 3.13, github.com/keras-team/keras/pull/21928
    "renorm": False,  # 3.14, github.com/keras-team/keras/pull/22047
    "renorm_clipping": None,
    "renorm_momentum": 0.99,
    "input_axes": None,  # 3.15, github.com/keras-team/keras/pull/22789
    "output_axes": None,
}


def save_portable(model: "keras.Model", path: Path) -> None:
    """Save a model of built-in layers for Keras `OLDEST_KERAS` and later."""
    complete = path.with_name(f"complete-{path.name}")
    model.save(complete)
    with zipfile.ZipFile(complete) as saved, zipfile.ZipFile(path, "w") as portable:
        for member in saved.infolist():
            if member.filename == CONFIG_MEMBER:
                config = _without_defaults(json.loads(saved.read(member)))
                portable.writestr(member.filename, json.dumps(config))
            else:
                with saved.open(member) as source, portable.open(member, "w") as target:
                    shutil.copyfileobj(source, target)
    complete.unlink()


def _without_defaults(config: Any) -> Any:
    """Return a Keras config, parsed from JSON, without the settings of `LATER` that are at their defaults."""
    if isinstance(config, list):
        return [_without_defaults(value) for value in config]
    if isinstance(config, dict):
        return {
            name: _without_defaults(value)
            for name, value in config.items()
            if name not in LATER or value != LATER[name]
        }
    return config
