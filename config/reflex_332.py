# Reflex attention at the published size: three own heads, three of the layer before, two of the one before.
# python train.py config/reflex_332.py
attention = 'reflex(3-3-2)'
