# Cross-layer attention (Brandon et al., 2024): every other layer reads all of the layer before.
# python train.py config/plans/cla.py
attention = 'cla'
