# The gated delta rule (Yang et al., 2024): linear in the length, a state that does not grow, no positions.
# python train.py config/layers/gated_delta.py
attention = 'gated_delta'
position = 'none'
