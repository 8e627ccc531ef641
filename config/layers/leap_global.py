# LEAP without windows: every layer averages over all tokens so far.
# python train.py config/layers/leap_global.py
attention = 'leap(global)'
