# Reflex attention at the published size: five own heads, two of the layer before, one of the one before that.
# python train.py config/reflex_521.py
attention = 'reflex(5-2-1)'
