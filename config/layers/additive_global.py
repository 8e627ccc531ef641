# Causal Fastformer as it is: every layer averages over all tokens so far.
# python train.py config/layers/additive_global.py
attention = 'additive(global)'
