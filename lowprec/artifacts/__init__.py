"""File formats: the run folder, the compressed-tensors checkpoint, the probe set, digests, the model card, inputs."""
