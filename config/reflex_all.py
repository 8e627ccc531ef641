# Reflex attention over all layers, at the published size: each layer reads one head of every earlier layer.
# python train.py config/reflex_all.py
attention = 'reflex_all'
