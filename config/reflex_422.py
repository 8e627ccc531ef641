# Reflex attention at the published size: four own heads, two of the layer before, two of the one before that.
# python train.py config/reflex_422.py
attention = 'reflex(4-2-2)'
