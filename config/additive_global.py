# Causal Fastformer as it is: every layer averages over all tokens so far.
# python train.py config/additive_global.py
attention = 'additive(global)'
