"""What a run needs beside its model: checkpoints, metrics, optimizers, devices, pretrained weights."""
