# Learnable ResFormer (Zhou et al., 2024): each layer mixes its values with those of layer 0.
# python train.py config/plans/value_residual.py
attention = 'value_residual'
