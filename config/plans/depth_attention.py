# Depth-Attention (Zeng et al., 2026): values are mixed with those of earlier layers, as a query asks.
# python train.py config/plans/depth_attention.py
attention = 'depth_attention'
