"""The classifiers: architectures, pretrained weights, the model folder, and inference."""
