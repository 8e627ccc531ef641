# Exclusive self-attention (Zhai, 2026): what is read, without the part along the token's own value.
# python train.py config/plans/exclusive.py
attention = 'exclusive'
