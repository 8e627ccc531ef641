# Reflex attention up to lag 3: four own heads, two of the layer before, one each of the two before that.
# python train.py config/plans/reflex_4211.py
attention = 'reflex(4-2-1-1)'
