# LEAP at the published size of reflex attention: windows of 4, 8, 16, 32, 64 tokens, the last layer global.
# python train.py config/leap.py
attention = 'leap'
