# SkipV1Former whose other heads have a value residual: they mix their values with those of layer 0.
# python train.py config/plans/skip_v1_residual.py
attention = 'layer0_residual(8/4-4)'  # keys/values
