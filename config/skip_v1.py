# SkipV1Former (Wu et al., 2025): own keys throughout; half of the heads take layer 0's values.
# python train.py config/skip_v1.py
attention = 'layer0(8/4-4)'  # keys/values
