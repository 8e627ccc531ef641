# Causal Fastformer with the windows of LEAP: 4, 8, 16, 32 and 64 tokens, the last layer global.
# python train.py config/layers/additive.py
attention = 'additive'
